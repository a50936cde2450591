"""Input and output paths shared by several commands: checks, folders, prompts."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from scalewise import mini
from scalewise.config.recipe import Recipe, RecipeError
from scalewise.data.header import INDEX_FILE
from scalewise.data.prompts import read_prompt_file
from scalewise.metrics.geneval import geneval_prompts

MAX_NAME_BYTES = 255
"""Maximum length of a file name in nearly all file systems."""


def check_out(out: Path) -> None:
    """Check that results can be written to a folder, without creating it; RecipeError if not."""
    try:
        os.lstat(out)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise RecipeError(
                f"The folder {out} cannot be created: its name is too long. Choose another --out."
            ) from None
    if out.exists() and not out.is_dir():
        raise RecipeError(f"{out} is a file; --out must be a folder.")
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise RecipeError(f"The folder {out} cannot be created: {existing} is a file. Choose another --out.")
    if not os.access(existing, os.W_OK):
        raise RecipeError(f"{existing} is not writable; choose another --out.")


def make_folder(out: Path) -> None:
    """Create the folder for results."""
    check_out(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(
            f"The folder {out} cannot be created ({error.strerror}); choose another --out."
        ) from error


def default_run_folder(recipe: Recipe) -> Path:
    """Return runs/NAME, the folder of a run without --out; RecipeError if the name is not a folder name."""
    name = recipe.name
    if (
        name.strip() in ("", ".", "..")
        or any(c in "/\\" or not c.isprintable() for c in name)
        or len(name.encode()) > MAX_NAME_BYTES
    ):
        raise RecipeError(
            f"The recipe name {name!r} cannot be used as a folder in runs/; change it (name=...) or give "
            "--out."
        )
    return Path("runs") / name


def check_dataset_folder(out: Path) -> None:
    """Check that a folder is new, empty or contains only a synthetic dataset; RecipeError otherwise."""
    check_out(out)
    expected = re.compile(rf"{re.escape(INDEX_FILE)}|shard-\d+\.arrow|\..*")
    others = sorted(p.name for p in out.iterdir() if not expected.fullmatch(p.name)) if out.is_dir() else []
    if others:
        raise RecipeError(
            f"{out} contains {others[0]}{f' and {len(others) - 1} more' if len(others) > 1 else ''}, which "
            "does not belong to a dataset; choose an empty or new folder for --out."
        )


def evaluation_prompts(file: Path | None, base: str, count: int | None) -> list[str]:
    """Return the first `count` prompts (default: all) of a file, or the held-out captions of the mini.

    "geneval" gives prompts in the form of GenEval, 553 by default, which is the number of the original list.
    """
    if file == Path("geneval") and not file.exists():
        return geneval_prompts(553 if count is None else count)
    prompts = read_prompts(file, base, "test")
    if count is not None and count > len(prompts):
        raise RecipeError(f"There are only {len(prompts)} prompts, not {count}; reduce --count.")
    return prompts[:count]


def read_prompts(file: Path | None, base: str, split: str) -> list[str]:
    """Read prompts from a file, or return the captions of the mini."""
    if file is None:
        if not mini.is_named(base):
            raise RecipeError(
                "No prompts given; use --prompts FILE with one prompt per line (only the mini has its own "
                "captions)."
            )
        return mini.captions(split)
    if not file.exists():
        raise RecipeError(f"The prompt file {file} does not exist.")
    prompts = read_prompt_file(file)
    if not prompts:
        raise RecipeError(f"The prompt file {file} contains no prompts; write one per line.")
    return prompts
