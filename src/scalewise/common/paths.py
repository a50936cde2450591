"""Paths and names given by the user: "~" and Unicode normalization."""

from __future__ import annotations

import os
import unicodedata


def expand_home(name: str) -> str:
    """Replace a leading "~" or "~user" by the home folder, as a shell does; other names are unchanged.

    Shells do not expand it in `data.path=~/images` and `student:~/run`. A folder named "~" is `./~`.
    """
    return os.path.expanduser(name) if name.startswith("~") else name


def normalize_unicode(text: str) -> str:
    """Normalize text to NFC, the Unicode form in which names are compared.

    macOS stores the "é" of a file name as two characters, other systems as one.
    """
    return unicodedata.normalize("NFC", text)
