"""Models too large to draw with: offloaded weights, and students beside bases in fewer bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_run import make_tiny
from torch import Tensor, nn

from scalewise.config.recipe import Recipe
from scalewise.data.derive import encode_all_scales
from scalewise.evaluation.samplers import SamplerSpec, enter
from scalewise.method.backbone import Backbone
from scalewise.method.roles import Roles
from scalewise.method.sampling import sample_student
from scalewise.method.scales import Scale, ScaleSchedule
from scalewise.models import SD3, SDXL, Flux, PipelineAdapter, Wan
from scalewise.models.attached import attached, check_student
from scalewise.models.lora import Student, StudentError, fused, save_student
from scalewise.models.offloading import install_hooks
from scalewise.models.quantization import linear_layers
from scalewise.training import setup

CPU = torch.device("cpu")


def drawn(model: PipelineAdapter) -> Tensor:
    """Pixels of two prompts, and the latents that `generate` keeps of them, in one row."""
    small, full = (Scale(1, 4, 4), Scale(1, 8, 8)) if not model.video else (Scale(2, 4, 4), Scale(2, 8, 8))
    schedule = ScaleSchedule.build((1000, 600), (str(small), str(full)))
    cond = model.encode_prompts(["a dog", "a cat"])
    x0 = sample_student(Backbone(model), schedule, cond, [1, 2], role="teacher")
    kept = encode_all_scales(model, x0, [small, full])
    return torch.cat([model.decode(x0).flatten(), *(kept[s].flatten() for s in (small, full))])


@pytest.mark.parametrize("how", ["components", "blocks"])
@pytest.mark.parametrize("family", [SD3, Flux, SDXL, Wan])
def test_offloaded_models_draw_the_same_twice(family: type[SD3], how: str) -> None:
    model = family.tiny()
    wanted = drawn(model)
    install_hooks(model, how, CPU, denoiser_stays=False)  # type: ignore[arg-type]
    hooked = [m for m in model.denoiser.modules() if hasattr(m, "_hf_hook") or hasattr(m, "_diffusers_hook")]
    assert len(hooked) == 1 if how == "components" else len(hooked) > 2
    assert model.device == CPU
    for _ in range(2):
        assert torch.allclose(drawn(model), wanted, atol=2e-6)


def test_components_take_turns_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is this one's CPU under another name, so what is watched is who is sent where, and when."""
    model = SD3.tiny()
    names = {
        id(part): name for name, part in model.pipeline.components.items() if isinstance(part, nn.Module)
    }
    where, most = dict[str, str](), list[tuple[str, ...]]()
    before = nn.Module.to

    def watch(self: nn.Module, device: object, *more: object, **named: object) -> nn.Module:
        if id(self) in names:
            where[names[id(self)]] = str(device)
            most.append(tuple(sorted(n for n, place in where.items() if place == "cpu:0")))
        return before(self, device, *more, **named)

    monkeypatch.setattr(nn.Module, "to", watch)
    install_hooks(model, "components", torch.device("cpu:0"), denoiser_stays=False)
    assert set(where.values()) == {"cpu"}
    # A part at "cpu:0" reads as lying on "cpu": who sends whom home is read off the hooks.
    texts = ["text_encoder", "text_encoder_2", "text_encoder_3"]
    order = [*texts, "transformer", "vae"]
    previous = [getattr(model.pipeline, name)._hf_hook.prev_module_hook.model for name in order]
    assert [names[id(part)] for part in previous] == ["vae", *order[:-1]]
    drawn(model)
    assert {name for together in most for name in together} == set(order)


def test_a_denoiser_in_fewer_bits_stays_on_the_device() -> None:
    model = SD3.tiny()
    install_hooks(model, "components", CPU, denoiser_stays=True)
    assert not hasattr(model.denoiser, "_hf_hook") and hasattr(model.pipeline.vae, "_hf_hook")
    assert model.device == CPU


@pytest.fixture
def tiny(tmp_path: Path) -> Recipe:
    return make_tiny(tmp_path)


def test_without_an_accelerator_offloading_says_that_it_does_nothing(tiny: Recipe) -> None:
    with pytest.warns(UserWarning, match=r"model\.offload=blocks has no effect without an acc"):
        model = setup.load(tiny.override(["model.offload=blocks"]), ["denoiser"])
    assert model.execution_device is None


def test_training_is_not_offloaded_and_drawing_is_what_plan_proposes(
    tiny: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, bool]] = []

    def watch(_model: PipelineAdapter, how: str, _device: object, *, denoiser_stays: bool) -> bool:
        asked.append((how, denoiser_stays))
        return False

    monkeypatch.setattr(setup, "offload", watch)
    recipe = tiny.override(["model.offload=components"])
    setup.load(recipe, ["denoiser"], training=True)
    assert asked == []
    setup.teacher(recipe)
    assert asked == [("components", False)]


def make_student(model: PipelineAdapter) -> Student:
    """A student of rank 2 that moves every layer."""
    other = type(model).tiny()
    roles = Roles(other.denoiser, ["student"], rank=2, targets=other.lora_targets, seed=5)
    tensors = {k: v.detach().clone() + 0.05 for k, v in roles.parameters("student").items()}
    biased, bias_alone = [n.removesuffix(".lora_A.weight") for n in tensors if ".lora_A." in n][:2]
    for layer in (biased, bias_alone):
        tensors[f"{layer}.lora_B.bias"] = torch.full((len(tensors[f"{layer}.lora_B.weight"]),), 0.5)
    del tensors[f"{bias_alone}.lora_A.weight"], tensors[f"{bias_alone}.lora_B.weight"]
    return Student(tensors, ScaleSchedule.build((1000,), ("8",)), 2, 4.0, "tiny", {})


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_a_student_beside_the_weights_draws_as_one_that_is_fused_and_leaves_no_trace(weight: float) -> None:
    model = SD3.tiny()
    student, plain = make_student(model), drawn(model)
    with fused(model.denoiser, student, weight=weight):
        wanted = drawn(model)
    with attached(model.denoiser, student, weight=weight):
        found = drawn(model)
    assert (wanted - plain).norm() > 100 * (found - wanted).norm() > 0
    assert torch.equal(drawn(model), plain)


def test_a_convolution_cannot_be_attached_and_is_named() -> None:
    model = SD3.tiny()
    path = "pos_embed.proj"
    weight = model.denoiser.get_submodule(path).weight
    pair = {"lora_A": weight.new_ones(2, *weight.shape[1:]), "lora_B": weight.new_ones(len(weight), 2, 1, 1)}
    student = Student(
        {f"{path}.{part}.weight": value for part, value in pair.items()},
        ScaleSchedule.build((1000,), ("8",)), 2, 4.0, "tiny", {},
    )  # fmt: skip
    with (
        pytest.raises(StudentError, match=r"the convolution pos_embed\.proj.*model\.quantize=none"),
        attached(model.denoiser, student),
    ):
        pass


@pytest.mark.parametrize("bits", ["int8", "nf4"])
def test_a_recipe_in_fewer_bits_draws_in_them_with_a_student_too(
    tiny: Recipe, bits: str, tmp_path: Path
) -> None:
    recipe = tiny.override([f"model.quantize={bits}"])
    whole, few = setup.load(tiny, ["denoiser"]), setup.load(recipe, ["denoiser"])
    assert list(linear_layers(whole)) and not list(linear_layers(few))
    student = make_student(SD3.tiny())
    save_student(tmp_path / "s.safetensors", student.tensors, tiny.override(["lora.rank=2", "lora.alpha=4"]))
    contender = SamplerSpec("student", "student", 1, 1.0, student.schedule, tmp_path / "s.safetensors")
    cond, x0 = SD3.tiny().encode_prompts(["a dog"]), []
    for model in (whole, few):
        with enter(model, contender) as sampler:
            x0.append(sampler(cond, cond, [3]))
        x0.append(sample_student(Backbone(model), student.schedule, cond, [3], role="teacher"))
    moved = [student - plain for student, plain in (x0[:2], x0[2:])]
    # The student moves both bases alike, whatever rounding does to the base itself.
    assert (moved[0] - moved[1]).norm() < 0.5 * moved[0].norm()


def test_a_student_of_another_base_is_refused_by_a_base_in_fewer_bits(tiny: Recipe) -> None:
    few = setup.load(tiny.override(["model.quantize=int8"]), ["denoiser"])
    student = make_student(SD3.tiny())
    name = next(n for n in student.tensors if ".lora_A." in n)
    student.tensors[name] = torch.zeros(2, 99)
    with pytest.raises(StudentError, match=r"does not fit this base: .* is not a linear layer of .* x 99"):
        check_student(few.denoiser, student)
    student.tensors[name] = torch.zeros(2, 4, 3, 3)
    with pytest.raises(StudentError, match=r"changes the convolution .*; sample with model\.quantize=none"):
        check_student(few.denoiser, student)
