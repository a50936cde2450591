"""Console output without a terminal, and error messages."""

from __future__ import annotations

import errno
import io

import pytest
from rich.console import Console

from scalewise.common import console


def test_progress_without_a_terminal_prints_a_line_periodically(
    capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.progress("drawing", 20) as done:
        for number in range(1, 21):
            done(number)
    lines = capsys.readouterr().err.splitlines()
    assert 5 <= len(lines) <= 8, "every third call of ten seconds each, and the last"
    assert lines[0].startswith("drawing: 3/20 after 30 s, about ") and lines[0].endswith("s left")
    assert lines[-1] == "drawing: 20/20 after 200 s"


def test_quick_work_prints_no_progress(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.time, "monotonic", lambda: 5.0)
    with console.progress("drawing", 2) as done:
        done(1)
        done(2)
    assert capsys.readouterr().err == ""


def test_a_full_disk_is_reported_with_its_path(capsys) -> None:
    assert console.print_error(OSError(errno.ENOSPC, "No space left on device", "/data/x")) == 1
    assert "The disk is full (/data/x)" in " ".join(capsys.readouterr().err.split())


def test_ctrl_c_has_exit_code_130() -> None:
    assert console.print_error(KeyboardInterrupt()) == 130


def test_names_in_square_brackets_are_shown_as_they_are(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich would parse them as markup: "[v2]" vanishes, "[/b]" ends a comparison after all its work."""
    clock = iter(range(0, 10_000, 60))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.progress("drawing: [v2] mine[/b]", 1) as done:
        done(1)
    assert "drawing: [v2] mine[/b]: 1/1" in capsys.readouterr().err
    monkeypatch.setattr(
        console, "err", Console(file=(shown := io.StringIO()), force_terminal=True, width=120)
    )
    with console.progress("drawing: [v2] mine[/b]", 1) as done:
        done(1)
    assert "[v2] mine[/b]" in shown.getvalue()


def test_only_errors_are_shown_when_not_verbose(capsys) -> None:
    console.set_verbose(False)
    try:
        with console.progress("drawing", 1) as done:
            done(1)
        console._show_warning("careful", UserWarning)
        console.out.print("a result")
        assert capsys.readouterr() == ("", "")
        console.print_error(ValueError("broken"))
        assert "broken" in capsys.readouterr().err
    finally:
        console.set_verbose(True)
