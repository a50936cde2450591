"""`python -m scalewise`, and the script `scalewise`, are the command line in a process of its own."""

from __future__ import annotations

import os
import signal
from types import FrameType

from scalewise.common.signals import STOPPED_MESSAGE, exit_code


def _leave(_number: int, _frame: FrameType | None) -> None:
    """Ctrl-C before the command line has begun, or after it has ended."""
    os.write(2, f"{STOPPED_MESSAGE}\n".encode())
    os._exit(exit_code("SIGINT"))


def main() -> None:
    """Run the command line; Ctrl-C has its exit code from the first import to the last clean-up."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    from scalewise.cli import main as command_line

    try:
        command_line()
    finally:
        if hasattr(signal, "pthread_sigmask"):  # not on Windows; Python drops its handlers at its end
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


if __name__ == "__main__":
    main()
