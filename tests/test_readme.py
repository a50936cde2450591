"""Every command of the README is run, in its order, shortened where it would take minutes."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from scalewise.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text()

# What shortens a command, by its first word; a command that is not here runs as it stands.
SHORTER = {
    "generate": ["--count", "16"],
    "distill": ["data.path=synthetic", "train.iterations=2", "train.batch=2", "train.sample_prompts=[]"],
    "evaluate": ["--count", "4", "--no-speed"],
}


def blocks_of(*languages: str) -> list[str]:
    """The README's code blocks in any of the languages; "" is a block that names none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.S | re.M)
    return [text for language, text in found if language in languages]


def commands() -> list[str]:
    """The lines of the README's command blocks, without comments."""
    blocks = blocks_of("", "bash", "sh")
    lines = [re.sub(r"\s#.*", "", line).strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def test_the_two_commands_come_first() -> None:
    assert commands()[:2] == ["make demo", "make test"]


def test_make_knows_both_commands() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    assert re.search(r"^demo: venv\n\t.*scalewise demo", makefile, flags=re.M)
    assert re.search(r"^test: ", makefile, flags=re.M)


@pytest.mark.timeout(900)
def test_the_tour_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = []
    for line in commands():
        if line.startswith("make ") or line == "scalewise demo":
            continue  # the demo has a test of its own below, make is what runs this
        line, _, target = line.partition(" > ")
        program, word, *rest = shlex.split(line)
        assert program == "scalewise", line
        arguments = [word, *rest, *SHORTER.get(word, [])]
        if target:
            done = subprocess.run(
                [sys.executable, "-m", "scalewise", *arguments], capture_output=True, text=True
            )
            assert done.returncode == 0, (line, done.stderr)
            (tmp_path / target.strip()).write_text(done.stdout)
        else:
            with pytest.raises(SystemExit) as ended:
                main(arguments)
            assert ended.value.code == 0, line
        ran.append(word)
    assert {"recipes", "generate", "distill", "sample", "evaluate"} <= set(ran)
    assert (tmp_path / "runs" / "mini" / "student.safetensors").exists()
    assert (tmp_path / "evaluation" / "figures.md").exists()


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = blocks_of("python")
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    with Image.open(tmp_path / "apple.png") as picture:
        assert picture.size == (128, 128)
