"""Prompts longer than text encoders read, counted in one sentence for all that are encoded together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def overlong(prompts: Sequence[str], readers: Sequence[tuple[Any, int, str]]) -> str:
    """Say how many of the different prompts are longer than each text encoder reads, or return "".

    `readers`: tokenizer, tokens read and name of every text encoder.
    """
    different = list(dict.fromkeys(prompt for prompt in prompts if prompt))
    if not different:
        return ""
    lengths = {name: [len(ids) for ids in tokenizer(different, verbose=False).input_ids]
               for tokenizer, _, name in readers}  # fmt: skip
    limits = {name: limit for _, limit, name in readers}
    cut = {name: sum(n > limits[name] for n in found) for name, found in lengths.items()}
    cutting = [name for name in cut if cut[name]]
    if not cutting:
        return ""
    longest = max(range(len(different)), key=lambda i: max(lengths[name][i] for name in cutting))
    shown = f"{different[longest][:60]!r}"
    first, *more = (f"{lengths[name][longest]} {{}}for {name}" for name in cutting)
    tokens = ", ".join([first.format("tokens "), *(words.format("") for words in more)])
    if len(different) == 1:
        reads = " and ".join(f"{name} reads ({limits[name]} tokens)" for name in cutting)
        told, example = f"The prompt {shown} is longer than {reads}", f"It has {tokens}."
    else:
        counts = [f"longer than {name} reads ({limits[name]} tokens)" for name in cutting]
        told = f"{cut[cutting[0]]:,} of {len(different):,} prompts are {counts[0]}" + "".join(
            f", {cut[name]:,} {words}" for name, words in zip(cutting[1:], counts[1:], strict=True)
        )
        example = f"The longest has {tokens}: {shown}."
    whole = [name for name in cut if not cut[name]]
    if whole:
        return (
            f"{told}; {' and '.join(whole)} reads {'it' if len(different) == 1 else 'them'} whole. {example}"
        )
    return f"{told}: the rest is ignored there. {example} Shorten what matters to that length."
