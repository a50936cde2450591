"""The words of the mini's captions, and the grammar: descriptions to captions and back.

A caption names everything that matters in a scene: things, their number, colors and relation, the background
and the style. It leaves open where things lie.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass
from functools import cache

THINGS = (
    "apple", "banana", "cat", "dog", "frog", "rabbit", "penguin", "crab", "fish", "whale", "turtle",
    "butterfly", "mushroom", "cactus", "sunflower", "star", "moon", "snowman", "car", "bus", "rocket",
    "airplane", "house", "guitar", "key", "umbrella", "balloon", "camera", "clock", "robot", "heart", "crown",
)  # fmt: skip
STYLES = ("noto", "ink")
BACKGROUNDS = {
    "white": (255, 255, 255),
    "blue": (120, 170, 250),
    "green": (140, 215, 140),
    "yellow": (250, 225, 120),
    "pink": (250, 180, 205),
    "gray": (190, 195, 200),
    "black": (35, 35, 45),
    "purple": (185, 150, 235),
    "orange": (250, 180, 110),
}
"""RGB values by name."""
INKS = {
    "red": (215, 40, 40),
    "blue": (40, 80, 215),
    "green": (30, 150, 60),
    "orange": (235, 125, 20),
    "purple": (130, 50, 190),
    "black": (20, 20, 25),
}
"""RGB values of the colors of things in the ink style, which draws a thing in one color."""
INK_BACKGROUNDS = ("white", "yellow", "pink", "gray")
"""Backgrounds on which every ink color is visible."""
NUMBERS = {2: "two", 3: "three", 4: "four"}
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""GenEval's six tasks, by GenEval's names."""
RELATIONS = {
    "left of": (("left of", "to the left of"), ("right of", "to the right of")),
    "above": (("above", "over"), ("below", "under")),
}
"""Phrases for a relation with the first thing first, and with the second thing first."""

_PLURALS = {"butterfly": "butterflies", "fish": "fish", "bus": "buses", "cactus": "cactuses"}
_CONNECTIVES = ("and", "with")
_FORMS = (
    "{what} on {article} {background} background, {style} style",
    "{what}, {background} background, {style} style",
    "{style} style: {what} on {background}",
)
_FORM_WEIGHTS = (3, 1, 1)


class CaptionError(ValueError):
    """A caption that is not one of the mini's grammar; the message names what is wrong."""


@dataclass(frozen=True)
class Thing:
    """A thing in a description: its name, its ink color (None outside the ink style), how many of it."""

    name: str
    color: str | None = None
    count: int = 1


@dataclass(frozen=True)
class Description:
    """What a caption says. `relation` is the position of the first thing relative to the second."""

    style: str
    background: str
    things: tuple[Thing, ...]
    relation: str | None = None

    @property
    def task(self) -> str:
        """The task of GenEval that the caption belongs to; `TASKS` lists them."""
        if self.relation:
            return "position"
        if self.things[0].count > 1:
            return "counting"
        if len(self.things) == 2:
            return "color_attr" if self.things[0].color else "two_object"
        return "colors" if self.things[0].color else "single_object"

    @property
    def combination(self) -> str:
        """Key for holding out scenes: things, colors, number, relation, style and background."""
        kind = {"single_object": "single", "colors": "single", "two_object": "two", "color_attr": "two"}
        things = [f"{thing.color or ''} {thing.name}" for thing in self.things for _ in range(thing.count)]
        if not self.relation:
            things.sort()
        return "|".join(
            [kind.get(self.task, self.task), *things, self.relation or "", self.style, self.background]
        )

    @property
    def held_out(self) -> bool:
        """Whether this combination is excluded from all training: one in ten, chosen by a hash."""
        return int(hashlib.md5(self.combination.encode()).hexdigest(), 16) % 10 == 0


def random_description(rng: random.Random, *, task: str | None = None) -> Description:
    """Generate a description of a task, or of a random one."""
    if task is None:
        style = rng.choice(STYLES)
        kind = rng.choices(("single", "counting", "two", "position"), (3, 2, 2, 2))[0]
    else:
        own_style = {"single_object": "noto", "two_object": "noto", "colors": "ink", "color_attr": "ink"}
        style = own_style.get(task) or rng.choice(STYLES)
        kind = {"counting": "counting", "position": "position"}.get(task) or (
            "single" if task in ("single_object", "colors") else "two"
        )
    grounds = INK_BACKGROUNDS if style == "ink" else tuple(BACKGROUNDS)
    background = rng.choice(grounds) if rng.random() < 0.8 else "white"
    names = rng.sample(THINGS, 2 if kind in ("two", "position") else 1)
    count = rng.randint(2, 4) if kind == "counting" else 1
    things = tuple(Thing(n, rng.choice(tuple(INKS)) if style == "ink" else None, count) for n in names)
    relation = rng.choice(tuple(RELATIONS)) if kind == "position" else None
    return Description(style, background, things, relation)


def write_caption(description: Description, rng: random.Random) -> str:
    """Write a caption of a description, choosing randomly among paraphrases."""
    things = description.things
    if things[0].count > 1:
        color = f"{things[0].color} " if things[0].color else ""
        what = f"{NUMBERS[things[0].count]} {color}{plural(things[0].name)}"
    elif len(things) == 1:
        what = _phrase(things[0])
    elif description.relation is None:
        one, two = things if rng.random() < 0.5 else reversed(things)
        what = f"{_phrase(one)} {rng.choice(('and', *_CONNECTIVES))} {_phrase(two)}"
    else:
        forward, backward = RELATIONS[description.relation]
        if rng.random() < 0.5:
            what = f"{_phrase(things[0])} {rng.choice(forward)} {_phrase(things[1])}"
        else:
            what = f"{_phrase(things[1])} {rng.choice(backward)} {_phrase(things[0])}"
    background = description.background
    return rng.choices(_FORMS, _FORM_WEIGHTS)[0].format(
        what=what, article=_article(background), background=background, style=description.style
    )


def parse_caption(caption: str) -> Description:
    """Parse a caption of the mini's grammar, ignoring case and a final period.

    Raises CaptionError, naming unknown words or the expected form, for any other text.
    """
    text = " ".join(caption.lower().split()).rstrip(".")
    if words := unknown_words(text):
        raise CaptionError(
            f"The caption {caption!r} has words that captions of scenes do not have: {', '.join(words)}; use "
            f"things such as {', '.join(THINGS[:5])} (all words are in scalewise.mini.grammar)."
        )
    for pattern in _patterns():
        if (match := pattern.fullmatch(text)) and (found := _parse_things(match["what"])):
            description = Description(match["style"], match["background"], *found)
            if problem := _problem(description):
                raise CaptionError(f"The caption {caption!r} cannot be drawn: {problem}.")
            return description
    raise CaptionError(
        f"The caption {caption!r} does not have the form of a caption of a scene, such as 'a red apple and a "
        "blue key on a white background, ink style' or 'three cats on a pink background, noto style'."
    )


def unknown_words(caption: str) -> list[str]:
    """Return the words of a caption that none of the mini's captions has, each once."""
    return [word for word in dict.fromkeys(words_of(caption)) if word not in vocabulary()]


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return re.findall(r"[^\s,.:]+", text.lower())


@cache
def vocabulary() -> frozenset[str]:
    """All words of the mini's captions."""
    phrases = [p for pairs in RELATIONS.values() for side in pairs for p in side]
    listed = " ".join([*_FORMS, *phrases, *_CONNECTIVES, *NUMBERS.values()])
    words = {word for word in words_of(listed) if not word.startswith("{")}
    return frozenset(words | {"a", "an", *THINGS, *map(plural, THINGS), *STYLES, *BACKGROUNDS, *INKS})


def plural(name: str) -> str:
    """Return the plural of a thing's name."""
    return _PLURALS.get(name, name + "s")


def with_article(words: str) -> str:
    """Return words with "a" or "an" in front."""
    return f"{_article(words)} {words}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _phrase(thing: Thing) -> str:
    words = f"{thing.color} {thing.name}" if thing.color else thing.name
    return with_article(words)


@cache
def _patterns() -> tuple[re.Pattern[str], ...]:
    named = {
        "what": r"(?P<what>.+)",
        "article": "an?",
        "background": f"(?P<background>{'|'.join(BACKGROUNDS)})",
        "style": f"(?P<style>{'|'.join(STYLES)})",
    }
    return tuple(re.compile(form.format(**named)) for form in _FORMS)


@cache
def _phrases() -> dict[str, Thing]:
    """Every thing by the words of a caption, such as "red apple" and "three cats"."""
    found = {}
    for name in THINGS:
        for color in (None, *INKS):
            prefix = f"{color} " if color else ""
            for article in ("a", "an"):
                found[f"{article} {prefix}{name}"] = Thing(name, color)
            for count, number in NUMBERS.items():
                found[f"{number} {prefix}{plural(name)}"] = Thing(name, color, count)
    return found


def _parse_things(text: str) -> tuple[tuple[Thing, ...], str | None] | None:
    """Parse the part of a caption that names the things; None if it does not fit the grammar."""
    known = _phrases()
    if text in known:
        return (known[text],), None
    for word in _CONNECTIVES:
        one, _, two = text.partition(f" {word} ")
        if one in known and two in known:
            return (known[one], known[two]), None
    for relation, (forward, backward) in RELATIONS.items():
        for phrases, swapped in ((forward, False), (backward, True)):
            for phrase in phrases:
                one, _, two = text.partition(f" {phrase} ")
                if one in known and two in known:
                    pair = (known[two], known[one]) if swapped else (known[one], known[two])
                    return pair, relation
    return None


def _problem(description: Description) -> str:
    """Return why there is no scene of a description, or "" if there is one."""
    things, style = description.things, description.style
    colored = [thing for thing in things if thing.color]
    if style == "ink" and len(colored) < len(things):
        return f"in the ink style every thing needs a color, one of {', '.join(INKS)}"
    if style != "ink" and colored:
        return f"in the {style} style things have their own colors; remove {colored[0].color!r}"
    if style == "ink" and description.background not in INK_BACKGROUNDS:
        return f"backgrounds of the ink style are {', '.join(INK_BACKGROUNDS)}"
    if len(things) == 2 and things[0].name == things[1].name:
        return f"it names two different things; ask for 'two {plural(things[0].name)}' instead"
    if len(things) == 2 and any(thing.count > 1 for thing in things):
        return "only one kind of thing can have a number"
    return ""
