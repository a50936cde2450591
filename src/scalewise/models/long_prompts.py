"""Warning text for prompts longer than the maximum length of text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def describe_truncation(prompts: Sequence[str], encoders: Sequence[tuple[Any, int, str]]) -> str:
    """Return a warning with the number of distinct prompts that text encoders truncate, or "" if there are
    none.

    `encoders`: tokenizer, maximum number of tokens and name of every text encoder.
    """
    different = list(dict.fromkeys(prompt for prompt in prompts if prompt))
    if not different:
        return ""
    lengths = {name: [len(ids) for ids in tokenizer(different, verbose=False).input_ids]
               for tokenizer, _, name in encoders}  # fmt: skip
    limits = {name: limit for _, limit, name in encoders}
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
        warning, example = f"The prompt {shown} is longer than {reads}", f"It has {tokens}."
    else:
        counts = [f"longer than {name} reads ({limits[name]} tokens)" for name in cutting]
        warning = f"{cut[cutting[0]]:,} of {len(different):,} prompts are {counts[0]}" + "".join(
            f", {cut[name]:,} {words}" for name, words in zip(cutting[1:], counts[1:], strict=True)
        )
        example = f"The longest has {tokens}: {shown}."
    whole = [name for name in cut if not cut[name]]
    if whole:
        return (
            f"{warning}; {' and '.join(whole)} reads "
            f"{'all of it' if len(different) == 1 else 'all of them'}. "
            f"{example}"
        )
    return f"{warning}; the rest is ignored. {example} Put the important words into that length."
