"""The words of the video mini's captions, and the grammar: descriptions to captions and back.

A caption names the things of a video, their motion and the background. It leaves open where they are.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations, zip_longest

from scalewise.mini.grammar import CaptionError, with_article, words_of

MOVING = (
    "cat", "frog", "penguin", "crab", "fish", "butterfly", "cactus", "moon", "car", "rocket", "guitar",
    "umbrella",
)  # fmt: skip
"""The things of the videos: those of the image mini that look different at 24 pixels and after a turn."""
GROUNDS = ("white", "pink", "gray", "purple")
"""The backgrounds of the videos, on which every thing is visible."""
LEFT, RIGHT, UP, DOWN, TURN, GROW, SHRINK, CROSS = (
    "left", "right", "up", "down", "turn", "grow", "shrink", "cross",
)  # fmt: skip
PHRASES = {
    LEFT: ("moving to the left", "moving left"),
    RIGHT: ("moving to the right", "moving right"),
    UP: ("rising", "moving up"),
    DOWN: ("falling", "moving down"),
    TURN: ("turning", "rotating"),
    GROW: ("growing", "getting larger"),
    SHRINK: ("shrinking", "getting smaller"),
    CROSS: ("crossing", "passing each other"),
}
"""Phrases of a caption by motion."""
MOTIONS = tuple(PHRASES)

_FORMS = ("{what} on a {background} background", "{what}, {background} background")


@dataclass(frozen=True)
class Motion:
    """What a caption of a video says: one thing and its motion, or two things that cross."""

    things: tuple[str, ...]
    motion: str
    background: str

    @property
    def combination(self) -> str:
        """Key for holding out videos: things, motion and background."""
        return "|".join([*sorted(self.things), self.motion, self.background])

    @property
    def held_out(self) -> bool:
        """Whether this combination is excluded from all training: one in five, chosen by a hash."""
        return int(_hash(self.combination), 16) % 5 == 0


def all_descriptions() -> Iterator[Motion]:
    """Yield every description once; the things of a crossing are in the order of `MOVING`."""
    for motion in MOTIONS:
        for background in GROUNDS:
            for things in combinations(MOVING, 2 if motion == CROSS else 1):
                yield Motion(things, motion, background)


def all_captions(description: Motion) -> list[str]:
    """Return every caption of a description; those of a crossing name the things in either order."""
    orders = [description.things]
    if description.motion == CROSS:
        orders.append(description.things[::-1])
    return [
        form.format(
            what=f"{' and '.join(map(with_article, things))} {phrase}", background=description.background
        )
        for things in orders
        for phrase in PHRASES[description.motion]
        for form in _FORMS
    ]


def write_motion(description: Motion, rng: random.Random) -> str:
    """Write a caption of a description, choosing randomly among paraphrases."""
    return rng.choice(all_captions(description))


def parse_motion(caption: str) -> Motion:
    """Parse a caption of a video, ignoring case and a final period; the things of a crossing are returned in
    the order of `MOVING`.

    Raises CaptionError with the unknown words or the expected form for any other text.
    """
    text = " ".join(caption.lower().split()).rstrip(".")
    found = _by_caption().get(text)
    if found:
        return found
    unknown = [word for word in dict.fromkeys(words_of(text)) if word not in motion_vocabulary()]
    if unknown:
        raise CaptionError(
            f"The caption {caption!r} has words that the video mini does not know: {', '.join(unknown)}; "
            f"its things are {', '.join(MOVING)}, its backgrounds {', '.join(GROUNDS)}."
        )
    raise CaptionError(
        f"The caption {caption!r} does not have the form of the video mini's captions, such as 'a rocket "
        "moving to the left on a white background' or 'a cat and a crab crossing, pink background'."
    )


@cache
def motion_vocabulary() -> frozenset[str]:
    """All words of the captions of videos."""
    return frozenset(word for caption in _by_caption() for word in words_of(caption))


@cache
def motion_captions(*, held_out: bool) -> tuple[str, ...]:
    """Return all captions of held-out combinations, or of the others: motions in turn, otherwise in an order
    chosen by a hash, and one caption of every combination before a second one.
    """
    by_motion: dict[str, list[tuple[int, str, str]]] = {motion: [] for motion in MOTIONS}
    for description in all_descriptions():
        if description.held_out == held_out:
            hashed = sorted((_hash(caption), caption) for caption in all_captions(description))
            by_motion[description.motion] += [(i, *pair) for i, pair in enumerate(hashed)]
    ordered = [sorted(found) for found in by_motion.values()]
    return tuple(one[2] for turn in zip_longest(*ordered) for one in turn if one)


@cache
def _by_caption() -> dict[str, Motion]:
    return {caption: found for found in all_descriptions() for caption in all_captions(found)}


def _hash(text: str) -> str:
    return hashlib.md5(text.encode()).hexdigest()
