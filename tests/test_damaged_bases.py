"""Damaged bases: loading and `plan` refuse them with the component, the file and the remedy."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from scalewise.method.scales import Scale
from scalewise.models import SD3, ModelError, load_model
from scalewise.models.meta import build_meta_model, build_vae

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "sd3"
    SD3.tiny().save(folder)
    return folder


@pytest.fixture
def base(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "base"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def pickled(file: Path) -> Path:
    """Write weights as a pickle in place of safetensors."""
    name = "pytorch_model.bin" if file.name == "model.safetensors" else "diffusion_pytorch_model.bin"
    torch.save(load_file(file), file.with_name(name))
    file.unlink()
    return file.with_name(name)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "vae": (shutil.rmtree, "The vae of BASE is missing: the folder BASE/vae does"),
    "scheduler": (shutil.rmtree, "The scheduler of BASE is missing: the folder BASE/scheduler does"),
    "tokenizer": (shutil.rmtree, "The tokenizer of BASE is missing: the folder BASE/tokenizer does"),
    "text_encoder/config.json": (Path.unlink, "BASE/text_encoder/config.json is missing"),
    "transformer/config.json": (lambda p: p.write_text("{}"), "BASE/transformer/config.json is empty"),
    "text_encoder_2/config.json": (
        lambda p: p.write_text("[]"),
        "2/config.json is not a mapping",
    ),
    "tokenizer/tokenizer_config.json": (
        lambda p: p.write_text("{"),
        "tokenizer_config.json is not valid JSON",
    ),
    f"transformer/{WEIGHTS}": (cut, f"BASE/transformer/{WEIGHTS} is not a complete safetensors file"),
    "text_encoder/model.safetensors": (cut, "The text_encoder of BASE is damaged: BASE/text_encoder/model."),
    f"vae/{WEIGHTS}": (lambda p: p.write_text("<html>"), f"BASE/vae/{WEIGHTS} is not a complete safetensors"),
}


@pytest.mark.parametrize("place", DAMAGE)
def test_loading_and_plan_name_the_component_the_file_and_the_remedy(base, place):
    damage, said = DAMAGE[place]
    damage(base / place)
    told = set()
    for judge in (load_model, build_meta_model):
        with pytest.raises(ModelError) as raised:
            judge(base)
        told.add(str(raised.value))
    assert len(told) == 1  # the same sentence
    message = told.pop()
    assert said.replace("BASE", str(base)) in message and message.endswith("Download the model again.")


def test_a_pointer_of_git_lfs_is_named_as_one(base):
    (base / "vae" / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 9\n")
    for judge in (load_model, build_meta_model):
        with pytest.raises(ModelError, match=r"The vae of .* is a Git LFS pointer\. Run `git lfs pull`"):
            judge(base)


def test_a_missing_shard_is_named(base):
    whole = base / "transformer" / WEIGHTS
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    whole.rename(whole.with_name(names[0]))
    (base / "transformer" / f"{WEIGHTS}.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"a": names[0], "b": names[1]}})
    )
    for judge in (load_model, build_meta_model):
        with pytest.raises(ModelError, match=rf"{names[1]} is missing, one of 2 weight files\. Download"):
            judge(base)


def test_parts_that_are_not_loaded_may_be_missing(base):
    shutil.rmtree(base / "text_encoder")
    (base / "vae" / WEIGHTS).unlink()
    assert load_model(base, parts=["denoiser"]).width == 16


@pytest.mark.parametrize(("name", "config"), [
    ("transformer", {"num_attention_heads": 3}), ("text_encoder", {"intermediate_size": 7}),
])  # fmt: skip
def test_weights_that_do_not_fit_their_configuration_are_refused_in_one_sentence(base, name, config):
    edit(base / name / "config.json", **config)
    with pytest.raises(ModelError) as raised:
        load_model(base)
    message = str(raised.value)
    assert message.startswith(f"The {name} of {base} has") and "do not match its config.json" in message
    assert "low_cpu_mem_usage" not in message and message.endswith("Download the model again.")


@pytest.mark.parametrize("file", [f"transformer/{WEIGHTS}", "text_encoder/model.safetensors"])
def test_weights_as_pickles_alone_are_refused_with_a_remedy_that_works(base, file, capsys, caplog):
    pickle = pickled(base / file)
    for judge in (load_model, build_meta_model):
        with pytest.raises(ModelError) as raised:
            judge(base)
    message = str(raised.value)
    assert f"only has weights as a pickle ({pickle})" in message and "pickles are not loaded" in message
    assert "An error occurred" not in capsys.readouterr().err + caplog.text
    remedy = message.partition("safetensors: ")[2].removesuffix(".")
    command = shlex.split(remedy)
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True, timeout=100)
    assert load_model(base).width == 16


def test_an_autoencoder_that_is_nowhere_is_refused_with_the_remedy(base, tmp_path, recwarn):
    (tmp_path / "empty").mkdir()
    for vae, said in (("nobody/none", "Cannot find the VAE 'nobody/none'"),
                      ("./nowhere", r"The VAE \./nowhere does not exist"),
                      (str(tmp_path / "empty"), "has no config.json")):  # fmt: skip
        with pytest.raises(ModelError, match=rf"{said}.*Set model\.vae to the folder"):
            load_model(base, vae=vae)
        with pytest.raises(ModelError, match=rf"{said}.*Set model\.vae to the folder"):
            build_vae(base, vae=vae)
    assert not [str(w.message) for w in recwarn if "symlink" in str(w.message)]
    (Path(shutil.copytree(base / "vae", tmp_path / "other")) / WEIGHTS).unlink()
    with pytest.raises(ModelError, match=r"The VAE .*other has no weights"):
        load_model(base, vae=tmp_path / "other")


def test_a_schedule_that_rises_to_noise_is_refused_at_loading(base):
    edit(base / "scheduler" / "scheduler_config.json", invert_sigmas=True)
    for judge in (load_model, build_meta_model):
        with pytest.raises(ModelError, match=r"has invert_sigmas=true.* Set invert_sigmas to false"):
            judge(base)
    model = SD3.tiny()
    model.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, invert_sigmas=True)
    with pytest.raises(ModelError, match="has invert_sigmas=true"):
        model.teacher_scheduler(4, Scale(1, 8, 8))
