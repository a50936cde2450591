"""What several commands read or prepare before they begin."""

from __future__ import annotations

import os
from pathlib import Path

from scalewise import mini
from scalewise.data.prompts import read_prompt_file
from scalewise.metrics.geneval import geneval_prompts
from scalewise.recipe import RecipeError


def check_out(out: Path) -> None:
    """Refuse what can be no folder for results, before anything is computed; makes nothing yet."""
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
        if base != "mini":
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
