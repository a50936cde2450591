"""Folders of images to judge: any format, GenEval's layout, more images than prompts."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scalewise.evaluation.samplers import Prompts
from scalewise.evaluation.stored_images import SamplerError, read_folder

PROMPTS = Prompts.of(["a cat", "a red dog", "the moon"]).captions


def save(folder: Path, *names: str) -> Path:
    """Write gray images whose shade is ten times their place."""
    for place, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (10 * place,) * 3).save(folder / name)
    return folder


def shades(images: np.ndarray) -> list[int]:
    return images[:, 0, 0, 0].astype(int).tolist()


@pytest.mark.parametrize("names", [
    ("0.jpg", "1.jpg", "2.jpg"), ("0.webp", "1.webp", "2.webp"), ("0.PNG", "01.JPG", "002.Jpeg"),
    ("a cat.jpg", "a red dog.WEBP", "the moon.png"),
])  # fmt: skip
def test_images_of_any_format_are_judged(names: tuple[str, ...], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shades(read_folder(save(tmp_path, *names), PROMPTS)) == pytest.approx([0, 10, 20], abs=1)


def test_two_images_of_one_number_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SamplerError, match=r"two images with number 1, 01\.jpg and 1\.png; remove one"):
        read_folder(save(tmp_path, "0.png", "01.jpg", "1.png", "2.png"), PROMPTS)


@pytest.mark.parametrize("names", [
    ("0.png", "1.png", "2.png", "3.png", "4.jpg"),
    ("a cat.png", "a red dog.png", "the moon.png", "x.png", "y.jpg"),
])  # fmt: skip
def test_images_beyond_the_prompts_are_counted_in_a_warning(names: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="has 5 images, but 3 are needed: 2 are ignored"):
        assert shades(read_folder(save(tmp_path, *names), PROMPTS)) == [0, 10, 20]


def geneval(folder: Path, suffix: str = "png") -> Path:
    """Two prompts of two samples each in the authors' layout, with the grids that they write."""
    names = [f"{n:05}/samples/{s:04}.{suffix}" for n in range(2) for s in range(2)]
    save(folder, *names, "00000/grid.png", "00001/grid.png")
    for number, prompt in enumerate(["a photo of a cat", "a photo of two dogs"]):
        told = {"tag": "counting", "include": [], "prompt": prompt}
        (folder / f"{number:05}" / "metadata.jsonl").write_text(json.dumps(told))
    return folder


@pytest.mark.parametrize("suffix", ["png", "JPG"])
def test_genevals_layout_is_read_by_prompt_and_sample(suffix: str, tmp_path: Path) -> None:
    folder = geneval(tmp_path, suffix)
    captions = Prompts.of(["a photo of two dogs", "a photo of a cat"], each=2).captions
    assert shades(read_folder(folder, captions)) == pytest.approx([20, 30, 0, 10], abs=1)
    with pytest.warns(UserWarning, match="has 4 images, but 1 are needed: 3 are ignored"):
        assert shades(read_folder(folder, Prompts.of(["a photo of two dogs"]).captions)) == pytest.approx(
            [20], abs=1
        )
    with pytest.raises(SamplerError, match="too few images with the caption 'a photo of two dogs'"):
        read_folder(folder, Prompts.of(["a photo of two dogs"], each=3).captions)


def test_genevals_metadata_without_a_prompt_is_named(tmp_path: Path) -> None:
    folder = geneval(tmp_path)
    (tmp_path / "00001" / "metadata.jsonl").write_text("{}")
    with pytest.raises(SamplerError, match=r"00001/metadata\.jsonl does not contain GenEval's"):
        read_folder(folder, Prompts.of(["a photo of a cat"]).captions)
