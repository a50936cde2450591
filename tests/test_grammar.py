"""The mini's captions: written from descriptions, parsed back, and what is said about other texts."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from scalewise.metrics.geneval import SIZES
from scalewise.mini.grammar import (
    INK_BACKGROUNDS,
    INKS,
    TASKS,
    CaptionError,
    Description,
    Thing,
    parse_caption,
    random_description,
    unknown_words,
    vocabulary,
    write_caption,
)
from scalewise.mini.scenes import held_out_captions, training_captions

BUS, CAT = Thing("bus"), Thing("cat")


def test_every_caption_is_parsed_back_to_its_description():
    rng = random.Random(0)
    for _ in range(3000):
        described = random_description(rng)
        found = parse_caption(write_caption(described, rng))
        if described.relation is None and len(described.things) == 2:  # "a and b" is "b and a"
            assert set(found.things) == set(described.things)
            assert (found.style, found.background) == (described.style, described.background)
        else:
            assert found == described


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("three penguins on a pink background, noto style", ("noto", "pink", (Thing("penguin", None, 3),))),
        ("Noto style: a bus above a cat on white.", ("noto", "white", (BUS, CAT), "above")),
        ("a cat under a bus, white background, noto style", ("noto", "white", (BUS, CAT), "above")),
        ("a cat to the right of a bus, gray background, noto style", ("noto", "gray", (BUS, CAT), "left of")),
        ("a bus with a cat, gray background, noto style", ("noto", "gray", (BUS, CAT))),
        ("two green fish on a white background, ink style", ("ink", "white", (Thing("fish", "green", 2),))),
    ],
)
def test_captions_are_parsed(caption, expected):
    assert parse_caption(caption) == Description(*expected)


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        (
            "a dragon eats a cat on a white background, noto style",
            "do not have: dragon, eats; use things such as apple",
        ),
        ("a cat", "does not have the form"),
        ("a cat on a white background", "does not have the form"),
        ("a red cat on a white background, noto style", "remove 'red'"),
        ("a cat on a white background, ink style", "every thing needs a color"),
        ("a red cat on a black background, ink style", "backgrounds of the ink style are white"),
        ("a cat and a cat on a white background, noto style", "ask for 'two cats'"),
        ("two cats and a bus on a white background, noto style", "only one kind of thing can have a number"),
        ("", "does not have the form"),
    ],
)
def test_other_texts_are_refused_with_the_reason(caption, message):
    with pytest.raises(CaptionError, match=message):
        parse_caption(caption)


def test_unknown_words_are_named_once_and_in_order():
    assert unknown_words("A wizard, a cat and a Wizard: at night") == ["wizard", "at", "night"]


def test_the_vocabulary_is_small_and_has_no_placeholders():
    assert 90 <= len(vocabulary()) <= 100
    assert all(word.isalpha() for word in vocabulary())


def test_tasks_have_the_names_of_geneval():
    assert set(TASKS) == set(SIZES)


@pytest.mark.parametrize("task", TASKS)
def test_a_description_of_a_task_belongs_to_it(task):
    rng = random.Random(1)
    for _ in range(200):
        described = random_description(rng, task=task)
        assert described.task == task
        colored = [thing.color in INKS for thing in described.things]
        assert all(colored) if described.style == "ink" else not any(colored)
        assert described.style != "ink" or described.background in INK_BACKGROUNDS


def test_one_combination_in_ten_is_held_out_whatever_the_order_of_two_things():
    rng = random.Random(2)
    described = [random_description(rng) for _ in range(5000)]
    assert 0.08 < sum(one.held_out for one in described) / 5000 < 0.12
    one, two = Description("noto", "white", (BUS, CAT)), Description("noto", "white", (CAT, BUS))
    assert one.combination == two.combination
    assert Description("noto", "white", (BUS, CAT), "above").combination != two.combination


def test_lists_of_captions_are_distinct_prefixes_and_separate():
    test, train = held_out_captions(600), training_captions(2000)
    assert len(set(test)) == 600 and len(set(train)) == 2000
    assert held_out_captions(300) == test[:300] and training_captions(50) == train[:50]
    assert {parse_caption(c).held_out for c in test} == {True}
    assert {parse_caption(c).held_out for c in train} == {False}


def test_held_out_captions_alternate_between_the_tasks():
    assert Counter(parse_caption(c).task for c in held_out_captions(60)) == dict.fromkeys(TASKS, 10)
    assert Counter(parse_caption(c).task for c in held_out_captions(2000))["position"] > 350
