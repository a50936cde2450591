"""The Python examples of the documentation run as they stand, and the changelog names modules that exist."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import scalewise
from scalewise.cli import main

DOCS = Path(__file__).parents[1] / "docs"


def run_blocks(page: str) -> dict[str, object]:
    """Execute a page's Python blocks one after the other in one namespace, and return it."""
    blocks = re.findall(
        r"^```python\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), flags=re.S | re.M
    )
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    return names


def test_the_loop_in_stock_diffusers_gives_the_image_of_the_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["export", "mini", "student.safetensors"])
    assert ended.value.code == 0
    torch = run_blocks("use-your-student.md")["torch"]
    pipe = scalewise.load("mini")
    own = pipe("a red apple, fluent style", generator=torch.Generator().manual_seed(0)).images[0]
    with Image.open("apple-stock.png") as stock:
        difference = np.abs(np.asarray(stock).astype(int) - np.asarray(own).astype(int))
    assert difference.max() <= 2
    assert Image.open("apple.png").size == (128, 128)


def test_the_examples_of_the_python_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_blocks("python-api.md")
    printed = capsys.readouterr().out
    assert "did you mean 'train.iterations'?" in printed
    assert "64 mini 4" in printed  # rank, base, iterations of the student
    with Image.open("apple.png") as image:
        assert image.size == (128, 128)


def moved_modules() -> list[tuple[str, str]]:
    text = (DOCS / "changelog.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `(scalewise\.[\w.]+)` \| `(scalewise\.[\w.]+)` \|$", text, flags=re.M)


def test_the_changelog_names_modules_that_are_there_now_and_not_where_they_were() -> None:
    moved = moved_modules()
    assert len(moved) > 70
    for before, now in moved:
        if now.rpartition(".")[2][0].isupper():
            module, _, name = now.rpartition(".")
            assert hasattr(importlib.import_module(module), name), now
        else:
            assert importlib.import_module(now)
            parent = before.rpartition(".")[0]
            gone = importlib.util.find_spec(parent) is None or importlib.util.find_spec(before) is None
            assert gone, before
