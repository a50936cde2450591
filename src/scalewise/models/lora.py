"""Student files: LoRA weights with schedule and recipe in the metadata, in one of three key formats."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from scalewise.common import checkpoint
from scalewise.common.finite import non_finite
from scalewise.common.paths import expand_home
from scalewise.config.recipe import Recipe
from scalewise.method.scales import ScaleSchedule
from scalewise.models import lora_foreign_keys, lora_keys

# The metadata key that diffusers reads in `pipeline.load_lora_weights`.
_DIFFUSERS_KEY = "lora_adapter_metadata"


class StudentError(ValueError):
    """A student file that cannot be used; the message contains the reason and the remedy."""


@dataclass(frozen=True)
class Student:
    """LoRA weights by parameter name, and the settings for sampling with them."""

    tensors: dict[str, Tensor]
    schedule: ScaleSchedule
    rank: int
    alpha: float
    base: str
    recipe: dict[str, Any]
    """Empty for files that were not written by scalewise."""
    denoiser: str = "transformer"
    """Name of the denoiser in the pipeline."""

    def __post_init__(self) -> None:
        refuse_non_finite(self.tensors, "The student", "Train it again with a lower optimizer.lr.")

    def match_to(self, module: nn.Module) -> Student:
        """Return the student with the layer names of a denoiser; raise StudentError if it does not fit."""
        layers = dict(module.named_modules())
        tensors = lora_keys.match_layers(self.tensors, layers)
        check_pairs(tensors)
        unmatched = {n for n in tensors if lora_keys.layer_of(n) not in layers}
        if unmatched:
            raise StudentError(
                f"The student does not fit this base: {len(unmatched)} of its {len(tensors)} weights belong "
                f"to layers that the base does not have, for example {min(unmatched)}. Use the base that "
                "the student was trained with."
            )
        for name, a in tensors.items():
            if name.endswith(".lora_A.weight"):
                layer: Any = layers[name.removesuffix(".lora_A.weight")]
                weight = getattr(layer, "base_layer", layer).weight
                if not weight.is_floating_point():
                    raise StudentError(
                        "A student cannot be fused into the weights of a quantized base; use "
                        "model.quantize=none."
                    )
                _check_shape(name, weight, a, b=tensors[name.replace("lora_A", "lora_B")])
            elif name.endswith(".lora_B.bias"):
                _check_bias(name, layers[lora_keys.layer_of(name)], a)
        return replace(self, tensors=tensors)


def versions() -> dict[str, str]:
    """Return the versions of this package and of its main dependencies."""
    names = ("scalewise-diffusion", "torch", "diffusers", "transformers", "peft", "safetensors")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def save_student(
    path: Path, tensors: dict[str, Tensor], recipe: Recipe, *, dtype: torch.dtype = torch.float16,
    form: lora_keys.Form = "diffusers", denoiser: str = "transformer",
) -> None:  # fmt: skip
    """Write the student of a recipe atomically, with the schedule in the metadata."""
    student = make_student(tensors, recipe, denoiser=denoiser)
    write_student(path, student, dtype=dtype, form=form)


def make_student(
    tensors: dict[str, Tensor], recipe: Recipe, *, schedule: ScaleSchedule | None = None,
    denoiser: str = "transformer",
) -> Student:  # fmt: skip
    """Create the student of a recipe from its weights."""
    alpha = recipe.lora.alpha if recipe.lora.alpha is not None else float(recipe.lora.rank)
    return Student(
        tensors, schedule or recipe.schedule.build(), recipe.lora.rank, alpha, recipe.model.base,
        recipe.model_dump(mode="json"), denoiser,
    )  # fmt: skip


def write_student(
    path: Path, student: Student, *, dtype: torch.dtype = torch.float16, form: lora_keys.Form = "diffusers"
) -> None:
    """Write a student atomically in one of the key formats, with the same metadata in all of them.

    Raises StudentError, and writes nothing, for weights that are NaN or infinite in `dtype`.
    """
    remedy = "Train with a lower optimizer.lr, or resume from an earlier checkpoint."
    cast = {name: tensor.to(dtype) for name, tensor in student.tensors.items()}
    refuse_non_finite(cast, f"The student was not written to {path}: it", remedy)
    layers = sorted({lora_keys.layer_of(name) for name in student.tensors})
    settings: dict[str, Any] = {"r": student.rank, "lora_alpha": student.alpha, "target_modules": layers}
    if any(name.endswith(".bias") for name in student.tensors):
        settings["lora_bias"] = True
    metadata = {
        "format": "pt",
        "scalewise.timesteps": json.dumps(student.schedule.timesteps),
        "scalewise.scales": json.dumps([str(s) for s in student.schedule.scales]),
        "scalewise.rank": str(student.rank),
        "scalewise.alpha": str(student.alpha),
        "scalewise.base": student.base,
        "scalewise.denoiser": student.denoiser,
        "scalewise.layers": str(len(layers)),
        "scalewise.versions": json.dumps(versions()),
        "scalewise.recipe": json.dumps(student.recipe),
    }
    if form == "diffusers":
        metadata[_DIFFUSERS_KEY] = json.dumps({f"{student.denoiser}.{k}": v for k, v in settings.items()})
    named = lora_keys.write_names(
        {k: v.to(dtype).contiguous() for k, v in student.tensors.items()}, form, denoiser=student.denoiser,
        alpha=torch.tensor(student.alpha),
    )  # fmt: skip
    if form == "peft":  # PEFT reads a folder with weights and settings
        path.mkdir(parents=True, exist_ok=True)
        config = {"peft_type": "LORA", "base_model_name_or_path": student.base, **settings}
        (path / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        path = path / "adapter_model.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = sorted_header(save(named, metadata=metadata))
    checkpoint.write_atomically(path, lambda temporary: temporary.write_bytes(content))


def sorted_header(data: bytes) -> bytes:
    """Sort the header of a safetensors file, so that equal contents give equal bytes.

    A file consists of the length of the header (8 bytes, little-endian), the header as JSON, and the tensors.
    """
    length = int.from_bytes(data[:8], "little")
    text = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":"))
    header = text.encode().ljust(-(-len(text.encode()) // 8) * 8)  # tensors begin at a multiple of 8
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


@contextmanager
def fused(module: nn.Module, student: Student, *, weight: float = 1.0) -> Iterator[None]:
    """Fuse a student into the weights within a `with` block, and restore them bit-exactly after it.

    W + weight alpha / rank B A: a forward pass costs the same as that of the teacher.
    """
    before: dict[nn.Parameter, Tensor] = {}
    try:
        before = fuse(module, student, weight=weight)
        yield
    finally:
        for parameter, original in before.items():
            parameter.data = original.to(parameter.device)


def fuse(module: nn.Module, student: Student, *, weight: float = 1.0) -> dict[nn.Parameter, Tensor]:
    """Fuse a student into the weights of a module; return the previous weights by parameter."""
    student, before = student.match_to(module), dict[nn.Parameter, Tensor]()
    for name, a in student.tensors.items():
        if name.endswith(".lora_A.weight"):
            parameter: Any = module.get_submodule(name.removesuffix(".lora_A.weight")).weight
            b = student.tensors[name.replace("lora_A", "lora_B")].to(parameter.device)
            before[parameter] = _kept(parameter)
            # For a convolution, A has its kernel size and B a kernel of 1 x 1.
            product = b.float().flatten(1) @ a.to(parameter.device).float().flatten(1)
            update = weight * student.alpha / student.rank * product.view(parameter.shape)
        elif name.endswith(".lora_B.bias"):
            parameter = module.get_submodule(lora_keys.layer_of(name)).bias
            before[parameter] = _kept(parameter)
            update = weight * student.alpha / student.rank * a.to(parameter.device).float()
        else:
            continue
        parameter.data = (parameter.data.float() + update).to(parameter.dtype)
    return before


def _kept(parameter: nn.Parameter) -> Tensor:
    """Copy a parameter to main memory, because the device may not have room for a second copy of the base."""
    return parameter.detach().to("cpu", copy=True)


def refuse_non_finite(tensors: Mapping[str, Tensor], what: str, remedy: str) -> None:
    """Raise StudentError, with `what` as the subject, for weights with NaN or infinity."""
    broken = non_finite(tensors)
    if broken:
        raise StudentError(
            f"{what} has NaN or infinity in {len(broken)} of its {len(tensors)} weights, for example "
            f"{min(broken)}. {remedy}"
        )


def with_all_biases(tensors: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Add zeros so that every layer has A, B and a bias if one layer has a bias, as PEFT requires."""
    out, layers = dict(tensors), {lora_keys.layer_of(name) for name in tensors}
    for layer in layers if any(name.endswith(".bias") for name in tensors) else ():
        weight: Any = module.get_submodule(layer).weight
        zeros, kernel = weight.new_zeros, weight.shape[2:]
        out.setdefault(f"{layer}.lora_A.weight", zeros(1, weight.shape[1], *kernel))
        out.setdefault(f"{layer}.lora_B.weight", zeros(len(weight), 1, *(1 for _ in kernel)))
        out.setdefault(f"{layer}.lora_B.bias", zeros(len(weight)))
    return out


def check_pairs(tensors: Mapping[str, Tensor]) -> None:
    """Raise StudentError for weights that are not LoRA, and for layers without A or without B."""
    a, b = (
        {lora_keys.layer_of(n) for n in tensors if n.endswith(f".{k}.weight")} for k in ("lora_A", "lora_B")
    )
    strange = [n for n in tensors if not n.endswith((".lora_A.weight", ".lora_B.weight", ".lora_B.bias"))]
    if strange or not a:
        raise StudentError(
            f"The file is not a supported LoRA: {len(strange)} of {len(tensors)} weights are unexpected"
            + (f", for example {min(strange)}." if strange else ".")
            + " Use a file with key names of PEFT, diffusers or kohya."
        )
    if a != b:
        raise StudentError(
            f"The student is incomplete: {len(a ^ b)} layers have only one of their two matrices, for "
            f"example {sorted(a ^ b)[0]}. Download or train it again."
        )


def _check_shape(name: str, weight: nn.Parameter, a: Tensor, *, b: Tensor) -> None:
    made_for = (b.shape[0], *a.shape[1:])
    if weight.shape != made_for or b.flatten(1).shape[1] != len(a):
        expected, own = (" x ".join(map(str, shape)) for shape in (made_for, weight.shape))
        raise StudentError(
            f"The student does not fit this base: {name} is for a layer of {expected}, but the layer has "
            f"{own}. Use the base that the student was trained with."
        )


def _check_bias(name: str, layer: Any, bias: Tensor) -> None:
    own = getattr(getattr(layer, "base_layer", layer), "bias", None)
    if own is None or own.shape != bias.shape:
        raise StudentError(
            f"The student does not fit this base: {name} is for a bias of {len(bias)} values, but the layer "
            f"has {'none' if own is None else len(own)}. Use the base that the student was trained with."
        )


def find_file(path: str | Path) -> Path:
    """Return the student file of a path: the file itself, or the one in the folder of a run or of PEFT."""
    file = Path(path)
    if file.is_dir():
        names = ("student.safetensors", "adapter_model.safetensors", "pytorch_lora_weights.safetensors")
        found = [file / name for name in names]
        file = next((f for f in found if f.exists()), found[0])
        pickles = sorted(p.name for p in Path(path).glob("*.bin"))
        if not file.exists() and pickles:
            raise StudentError(
                f"{path} contains {pickles[0]}, a pickle, and pickles are not loaded; convert it first."
            )
    if not file.exists():
        newest = checkpoint.newest(Path(path) / "checkpoints")
        hint = f", such as its newest one, {newest}" if newest else ""
        raise StudentError(
            f"There is no student at {path}; use a .safetensors file, the folder of a finished run or a "
            f"checkpoint{hint}."
        )
    if file.suffix != ".safetensors":
        raise StudentError(
            f"{file} is not a .safetensors file; other formats (pickles) are not loaded, convert it first."
        )
    return file


def load_student(path: str | Path, *, schedule: ScaleSchedule | None = None) -> Student:
    """Load a student from a .safetensors file, the folder of a run, a checkpoint, or a PEFT folder.

    `schedule` replaces the one in the metadata; it is required for files without. Raises StudentError.
    """
    path = expand_home(str(path))
    if checkpoint.is_checkpoint(Path(path)):
        return _from_checkpoint(Path(path), schedule)
    file = find_file(path)
    try:
        with safe_open(file, "pt") as opened:
            head = opened.metadata() or {}
            raw = {key: opened.get_tensor(key).float() for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise StudentError(f"{file} is damaged ({error}); download or train it again.") from error
    refuse_non_finite(raw, f"The student {file}", "Download it again, or train with a lower optimizer.lr.")
    if "scalewise.timesteps" in head:
        tensors = {_as_bias(name): value for name, value in lora_keys.read_names(raw)[0].items()}
        check_pairs(tensors)
        found = len({lora_keys.layer_of(name) for name in tensors})
        wanted = int(head.get("scalewise.layers", found))
        if found != wanted:
            raise StudentError(
                f"{file} contains {found} of {wanted} layers ({wanted - found} are missing); download or "
                "train it again."
            )
        own = ScaleSchedule.build(
            json.loads(head["scalewise.timesteps"]), json.loads(head["scalewise.scales"])
        )
        return Student(
            tensors, schedule or own, int(head["scalewise.rank"]), float(head["scalewise.alpha"]),
            head["scalewise.base"], json.loads(head["scalewise.recipe"]),
            head.get("scalewise.denoiser", "transformer"),
        )  # fmt: skip
    try:
        tensors, alphas = lora_foreign_keys.convert(raw)
    except lora_foreign_keys.ForeignError as error:
        raise StudentError(f"{file} {error}.") from error
    check_pairs({_as_bias(name): value for name, value in tensors.items()})
    if schedule is None:
        raise StudentError(
            f"{file} has no schedule in its metadata, because it was not written by scalewise. Specify the "
            "schedule: the name of a recipe (`scalewise recipes` lists them) or timesteps with scales, as in "
            '"1000@64 896@80 737@96 602@128". `scalewise export FILE OUT --schedule ...` stores it in a file.'
        )
    return _from_foreign(tensors, alphas, _settings(file, head), schedule=schedule)


def _as_bias(name: str) -> str:
    return f"{name.removesuffix('.diff_b')}.lora_B.bias" if name.endswith(".diff_b") else name


def _from_checkpoint(folder: Path, schedule: ScaleSchedule | None) -> Student:
    """Return the student of a checkpoint, from the averaged weights if there are any."""
    state, meta = checkpoint.load(folder)
    recipe = Recipe.from_mapping(meta["recipe"], origin=f"the recipe of {folder}")
    tensors = {name: value.float() for name, value in state.get("average", state["student"]).items()}
    refuse_non_finite(tensors, f"The checkpoint {folder}", "Use an earlier one.")
    unet = any(name.startswith(("down_blocks", "mid_block", "up_blocks")) for name in tensors)
    recipe = recipe.with_values({"train.iterations": state["iteration"]})
    return make_student(
        tensors, recipe, schedule=schedule, denoiser=meta.get("denoiser", "unet" if unet else "transformer")
    )


def _settings(file: Path, head: Mapping[str, str]) -> dict[str, Any]:
    """Read the PEFT settings of a file from its metadata (diffusers) or from adapter_config.json (PEFT)."""
    config = file.with_name("adapter_config.json")
    text = head.get(_DIFFUSERS_KEY) or (config.read_text(encoding="utf-8") if config.exists() else "{}")
    try:
        found = {key.rpartition(".")[2]: value for key, value in json.loads(text).items()}
    except (ValueError, AttributeError) as error:
        raise StudentError(f"The settings of {file} are damaged ({error}); download it again.") from error
    unknown = [name for name in ("alpha_pattern", "use_dora") if found.get(name)]
    if unknown:
        raise StudentError(f"{file} uses {unknown[0]}, which is not supported; train it without.")
    return found


def _from_foreign(
    tensors: dict[str, Tensor], alphas: dict[str, float], config: dict[str, Any], *, schedule: ScaleSchedule
) -> Student:
    """Create a student from a file of another program; alpha comes from the file or from PEFT."""
    ranks = {lora_keys.layer_of(name): a.shape[0] for name, a in tensors.items() if ".lora_A." in name}
    rank, out = max(ranks.values()), dict[str, Tensor]()
    for name, value in tensors.items():
        layer = lora_keys.layer_of(name)
        own = ranks.get(layer, rank)
        alpha = alphas.get(layer, config.get("lora_alpha", own))
        scale = alpha / own**0.5 if config.get("use_rslora") else alpha / own
        if name.endswith(".lora_A.weight"):
            # Padded to one rank, because student files have one rank for all layers.
            out[name] = F.pad(value, (*[0, 0] * (value.ndim - 1), 0, rank - own))
        elif name.endswith(".lora_B.weight"):
            # Scaled so that alpha = rank in every layer.
            out[name] = F.pad(value * scale, (*[0, 0] * (value.ndim - 2), 0, rank - own))
        elif name.endswith(".lora_B.bias"):
            out[name] = value * scale
        else:
            out[_as_bias(name)] = value
    unet = any(name.startswith(("down_blocks", "mid_block", "up_blocks")) for name in tensors)
    base = config.get("base_model_name_or_path") or ""
    return Student(
        out, schedule, rank, float(rank), base, {}, denoiser="unet" if unet else "transformer"
    )  # fmt: skip
