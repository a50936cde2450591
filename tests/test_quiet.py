"""What commands write to stderr is theirs: no other library's complaint, and no package without need."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scalewise.common import optional

# Every command once, in one process: what a library says on import, it says there.
COMMANDS = """
import sys
from pathlib import Path
from scalewise.cli import main
def stop(_):
    raise ValueError("that is enough")
Path("prompts.txt").write_text("a red apple\\na dog\\na cat\\na house\\n")
short = ["train.iterations=1", "train.batch=2", "train.sample_every=0", "loss.mmd_only=true"]
for command in [
    ["plan", "mini", "schedule.scales=[8]", "schedule.timesteps=[1000]"], ["recipes"],
    ["metrics"], ["study"], ["sample", "a red apple", "--out", "drawn"],
    ["generate", "mini", "--prompts", "prompts.txt", "--count", "2", "--out", "set"],
    ["distill", "mini", "data.path=set", *short, "--out", "run"], ["distill", "mini", "--dry-run"],
    ["export", "run", "student.safetensors"], ["spectrum", "mini", "--count", "8", "--out", "spectrum"],
    ["evaluate", "mini", "student:run", "--prompts", "prompts.txt", "--no-speed", "--out", "judged"],
    ["bench", "mini", "student:run", "--batch", "1", "--rounds", "1", "--out", "timed"], ["demo"],
]:
    if command == ["demo"]:
        from scalewise.cli import demo
        demo.probe = stop  # all is imported by then; training is another test's
    print("#", command[0], file=sys.stderr, flush=True)
    try:
        main(command)
    except SystemExit as ended:
        print("code", ended.code, "bits" if sys.modules.get("bitsandbytes") else "", file=sys.stderr)
    sys.stderr.flush()
"""
OURS = re.compile(
    r"(Warning: .+|[^/]+: \d+/[\d?]+ after \d+ s.*|mini: .+ iterations|Measuring .+|Error: that is enough)"
)


def run(code: str, folder: Path) -> tuple[str, str]:
    """Run Python code in `folder` by a process of its own: (stdout, stderr)."""
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, cwd=folder,
        env={**os.environ, "COLUMNS": "400", "SCALEWISE_CACHE": str(folder / "cache")},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return found.stdout, found.stderr


@pytest.mark.timeout(600)  # half a minute on a quiet machine
def test_no_command_shows_another_librarys_lines_or_imports_bitsandbytes(tmp_path: Path) -> None:
    _, errors = run(COMMANDS, tmp_path)
    told = errors.split("# ")[1:]
    assert len(told) == 13
    for command in told:
        name, *lines = command.strip().splitlines()
        ends = "code 1" if name == "demo" else "code 0"
        assert lines[-1].strip() == ends, f"{name}: {lines}"
        assert [line for line in lines[:-1] if line and not OURS.fullmatch(line)] == [], name


def modules_after(command: list[str], folder: Path) -> tuple[str, str, set[str]]:
    """Run a command in a process of its own: (stdout, stderr, names of the imported top-level modules)."""
    code = f"""
import sys
from scalewise.__main__ import main
sys.argv = ["scalewise", *{command!r}]
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
print("modules", *{{name.partition(".")[0] for name in sys.modules}})
"""
    printed, errors = run(code, folder)
    *lines, modules = printed.rstrip().splitlines()
    return "\n".join(lines), errors, set(modules.split()[1:])


@pytest.mark.parametrize("command", [["--help"], ["sample", "--help"], ["recipes", "--help"]])
def test_help_imports_neither_torch_nor_a_model_library(command: list[str], tmp_path: Path) -> None:
    printed, errors, modules = modules_after(command, tmp_path)
    assert "Usage" in printed and errors == ""
    heavy = {"torch", "diffusers", "transformers", "peft", "numpy", "PIL", "datasets", "huggingface_hub"}
    assert modules & heavy == set()
    assert {"scalewise", "typer"} <= modules


@pytest.mark.timeout(600)  # eight seconds on a quiet machine
def test_a_first_sample_needs_no_dataset_library_and_says_what_to_try_next(tmp_path: Path) -> None:
    printed, errors, modules = modules_after(["sample", "a red apple"], tmp_path)
    assert [line for line in errors.splitlines() if not OURS.fullmatch(line)] == []
    assert modules & {"datasets", "pandas", "matplotlib", "tensorboard", "bitsandbytes"} == set()
    file = Path("samples") / "a-red-apple-0.png"
    assert printed.splitlines()[0].endswith(f"s after loading: {file}") and (tmp_path / file).exists()
    assert printed.splitlines()[1:] == [
        "Next: scalewise sample 'a red apple' --teacher, or scalewise demo to train such a student"
    ]


@pytest.mark.timeout(600)  # five seconds on a quiet machine
def test_the_first_import_from_python_shows_no_warning_of_another_library(tmp_path: Path) -> None:
    code = """
import logging
import scalewise
assert scalewise.load and scalewise.distill
for name in ("transformers.utils.import_utils", "bitsandbytes.backends.cpu.ops"):
    assert logging.getLogger(name).level == logging.NOTSET, name
"""
    assert run(code, tmp_path) == ("", "")


def test_peft_looks_again_for_bitsandbytes_once_bits_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It remembers the answer; with an old one it would not know layers of 4 bits."""
    from peft.import_utils import is_bnb_available

    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    monkeypatch.setattr(optional.importlib, "import_module", lambda name: name)  # twice is too often
    is_bnb_available.cache_clear()
    with optional.without_bitsandbytes():
        assert importlib.util.find_spec("bitsandbytes") is None and not is_bnb_available()
        assert optional.import_bitsandbytes() == "bitsandbytes"
        assert importlib.util.find_spec("bitsandbytes") is not None and is_bnb_available()
    with optional.without_bitsandbytes():
        pass
    assert importlib.util.find_spec("bitsandbytes") is not None
