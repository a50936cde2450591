"""Names as the user writes them: "~" is the home folder, and one name has one form."""

from __future__ import annotations

import os
import unicodedata


def expand_home(name: str) -> str:
    """Replace a leading "~" or "~user" by the home folder, as a shell does; other names, hub ids too, stay.

    Shells leave it in `data.path=~/images` and `student:~/run`. A folder of that very name is `./~`.
    """
    return os.path.expanduser(name) if name.startswith("~") else name


def one_form(text: str) -> str:
    """Write text in the Unicode form (NFC) that names are compared in.

    macOS writes the "é" of a file's name as two characters, others as one.
    """
    return unicodedata.normalize("NFC", text)
