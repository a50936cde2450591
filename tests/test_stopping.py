"""Ctrl-C ends a command at any time with code 130 and one sentence; no library can swallow it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SLOW = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    sum(range(1000))
except BaseException:  # what C++ code would meet, which aborts the process
    print("raised within the import", flush=True)
    raise
print("imported", flush=True)
"""
PROBE = """
import atexit, os, signal, sys
from scalewise.common import console
from scalewise.cli import app
from scalewise.__main__ import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal

def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)

@app.command()
def probe():
{body}

sys.argv = ["scalewise", "probe"]
main()
"""
BODIES = {
    "between steps": "ctrl_c()\nprint('no')",
    "in an import, where C++ may not take an exception": "import slow\nprint('no')",
    "in an import, with work to be kept": (
        "with console.progress('x', 2) as done:\n    import slow\n    done(1)\n    print('no')"
    ),
    "where a library drops the exception": (
        "with console.progress('x', 2) as done:\n    try:\n        ctrl_c()\n    except BaseException:\n"
        "        print('dropped')\n    done(1)\n    print('no')"
    ),
    "dropped, and nothing comes after": "try:\n    ctrl_c()\nexcept BaseException:\n    print('dropped')",
    "in code that is text, as dataclasses are made": "exec('ctrl_c()', globals())\nprint('no')",
    "again while the first is dealt with": "try:\n    ctrl_c()\nfinally:\n    ctrl_c()\n    print('no')",
    "again at the end of the process": "atexit.register(ctrl_c)\nctrl_c()\nprint('no')",
}
SAID = {"in an import, with work to be kept": "imported", "where a library drops the exception": "dropped",
        "dropped, and nothing comes after": "dropped"}  # fmt: skip


def run_in(folder: Path, module: str, *words: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), str(Path(__file__).parents[1] / "src")])
    return subprocess.run(
        [sys.executable, "-m", module, *words], capture_output=True, text=True, timeout=60, cwd=folder,
        env={**os.environ, "PYTHONPATH": path}, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("where", BODIES)
def test_ctrl_c_ends_a_command_with_130(where: str, tmp_path: Path) -> None:
    body = "\n".join(f"    {line}" for line in BODIES[where].splitlines())
    (tmp_path / "stop_me.py").write_text(PROBE.format(body=body), encoding="utf-8")
    (tmp_path / "slow.py").write_text(SLOW, encoding="utf-8")
    done = run_in(tmp_path, "stop_me")
    assert done.returncode == 130, (done.returncode, done.stderr)
    assert done.stdout.split() == SAID.get(where, "").split()
    assert "Stopped. What was written so far is kept." in done.stderr and "Traceback" not in done.stderr


def test_ctrl_c_before_the_command_line_is_read_ends_with_130(tmp_path: Path) -> None:
    kill = "import os, signal\nif signal.getsignal(signal.SIGINT) != signal.SIG_IGN:\n"
    (tmp_path / "typer.py").write_text(f"{kill}    os.kill(os.getpid(), signal.SIGINT)\nprint('no')\n")
    (tmp_path / "begin.py").write_text(
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from scalewise.__main__ import main\nmain()\n"
    )
    done = run_in(tmp_path, "begin", "--help")
    assert (done.returncode, done.stdout) == (130, "") and "Traceback" not in done.stderr


def test_ctrl_c_that_is_ignored_in_the_background_stays_ignored(tmp_path: Path) -> None:
    body = "    signal.signal(signal.SIGINT, signal.SIG_IGN)"
    text = PROBE.format(body="    ctrl_c()\n    print('went on')").replace("default_int_handler", "SIG_IGN")
    assert body.strip() in text
    (tmp_path / "stop_me.py").write_text(text, encoding="utf-8")
    done = run_in(tmp_path, "stop_me")
    assert (done.returncode, done.stdout) == (0, "went on\n")
