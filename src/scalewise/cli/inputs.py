"""What several commands read or prepare before they begin."""

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

LONGEST_NAME = 255
"""Bytes of a file's name, in nearly all file systems."""


def check_out(out: Path) -> None:
    """Refuse what can be no folder for results, before anything is computed; makes nothing yet."""
    try:
        os.lstat(out)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise RecipeError(
                f"The folder {out} cannot be made, its name is too long; give --out another."
            ) from None
    if out.exists() and not out.is_dir():
        raise RecipeError(f"{out} is a file; give --out a folder, new or there already.")
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise RecipeError(f"The folder {out} cannot be made, for {there} is a file; give --out another.")
    if not os.access(there, os.W_OK):
        raise RecipeError(f"{there} may not be written to; give --out another folder.")


def folder_for(out: Path) -> None:
    """Make the folder that results go into."""
    check_out(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(
            f"The folder {out} cannot be made ({error.strerror}); give --out one that can."
        ) from error


def run_folder(recipe: Recipe) -> Path:
    """The folder of a run without --out: runs/ and the recipe's name, which must not lead out of it."""
    name = recipe.name
    if (
        name.strip() in ("", ".", "..")
        or any(c in "/\\" or not c.isprintable() for c in name)
        or len(name.encode()) > LONGEST_NAME
    ):
        raise RecipeError(
            f"The recipe's name {name!r} cannot name a folder in runs/; change it (name=...) or give --out."
        )
    return Path("runs") / name


def check_set_folder(out: Path) -> None:
    """Refuse a folder that holds anything but a synthetic set, before one is made in it."""
    check_out(out)
    own = re.compile(rf"{re.escape(INDEX_FILE)}|shard-\d+\.arrow|\..*")
    others = sorted(p.name for p in out.iterdir() if not own.fullmatch(p.name)) if out.is_dir() else []
    if others:
        raise RecipeError(
            f"{out} holds {others[0]}{f' and {len(others) - 1} more' if len(others) > 1 else ''}, which "
            "is not of a set; give --out a folder of its own."
        )


def prompts_to_judge(file: Path | None, base: str, count: int | None) -> list[str]:
    """The first `count` prompts, or all, of a file or the mini's held-out ones; named "geneval", GenEval's.

    The authors' list has 553 prompts, and so has GenEval's by default here.
    """
    if file == Path("geneval") and not file.exists():
        return geneval_prompts(553 if count is None else count)
    prompts = read_prompts(file, base, "test")
    if count is not None and count > len(prompts):
        raise RecipeError(f"There are {len(prompts)} prompts, not {count}; take at most as many.")
    return prompts[:count]


def read_prompts(file: Path | None, base: str, split: str) -> list[str]:
    """Prompts from a file, or the mini's own captions."""
    if file is None:
        if not mini.is_named(base):
            raise RecipeError(
                "Give --prompts FILE with one prompt a line; only the mini brings captions along."
            )
        return mini.captions(split)
    if not file.exists():
        raise RecipeError(f"There is no prompt file {file}.")
    prompts = read_prompt_file(file)
    if not prompts:
        raise RecipeError(f"The prompt file {file} holds no prompt; write one a line.")
    return prompts
