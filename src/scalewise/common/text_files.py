"""Reading of user-supplied text files, which must be UTF-8, with or without a byte order mark."""

from __future__ import annotations

import codecs
from pathlib import Path

_MARKS = {  # UTF-32 first: its mark begins with the one of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip
_BINARY = {
    b"PK\x03\x04": "a ZIP archive, such as .docx, .xlsx or .npz", b"\x1f\x8b": "compressed with gzip",
    b"\x89PNG": "a PNG image", b"\xff\xd8\xff": "a JPEG image", b"%PDF": "a PDF", b"PAR1": "Parquet",
}  # fmt: skip


class TextFileError(ValueError):
    """A text file that cannot be read; the message names the file and the remedy."""


def read_utf8(path: Path) -> str:
    """Read a text file with all line ends converted to "\\n" and without a byte order mark.

    Raises TextFileError if the file cannot be opened, is not UTF-8 (PowerShell's `>` writes UTF-16) or has
    NUL characters, as binary files and UTF-16 without a byte order mark do.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise TextFileError(f"{path} cannot be read ({error.strerror}); give another file.") from error
    if binary := next((kind for start, kind in _BINARY.items() if raw.startswith(start)), None):
        raise TextFileError(f"{path} is not a text file but {binary}; save its text as UTF-8.")
    if encoding := next((name for mark, name in _MARKS.items() if raw.startswith(mark)), None):
        by = " (the default of PowerShell's `>`)" if encoding == "UTF-16" else ""
        raise TextFileError(
            f"{path} is {encoding} text{by}; save it as UTF-8 (in PowerShell: ... | Out-File -Encoding utf8 "
            "FILE)."
        )
    if b"\x00" in raw:
        raise TextFileError(
            f"{path} is not UTF-8 text: it has NUL characters, as UTF-16 and binary files do; save it as "
            "UTF-8."
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextFileError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8.") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")
