"""Text files of the user: UTF-8, with or without a byte order mark; others are refused by name."""

from __future__ import annotations

import codecs
from pathlib import Path

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class TextFileError(ValueError):
    """A text file that cannot be read; the message names it and says what to do."""


def read_utf8(path: Path) -> str:
    """Read a text file; line ends of any system become "\\n", and a byte order mark is dropped.

    Raises TextFileError if the file cannot be opened or is not UTF-8, such as what PowerShell's `>` writes.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        if path.read_bytes().startswith(_UTF16):
            raise TextFileError(
                f"{path} is UTF-16 text, as PowerShell's `>` writes it; save it as UTF-8 (in PowerShell: "
                "... | Out-File -Encoding utf8 FILE)."
            ) from error
        raise TextFileError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8.") from error
    except OSError as error:
        raise TextFileError(f"{path} cannot be read ({error.strerror}); name another file.") from error
