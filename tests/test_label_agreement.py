"""The summary of judgements: agreement, biases, counts."""

import itertools
import json
import random

import pytest

from tieback.pipeline.labelling.agreement import judgement_figures
from tieback.pipeline.labelling.items import Item, content_hash
from tieback.pipeline.labelling.judgements import Judgement
from tieback.pipeline.labelling.summary import print_summary, readings


def make_item(number, num_responses=3):
    responses = [f"{number}" + "x" * index for index in range(num_responses)]
    return Item(content_hash("?", responses), {"prompt": "?", "responses": responses})


COUNTER = itertools.count()


def judgement(item, annotator, ranks, order=None, **more):
    return Judgement(
        judgement_id=str(next(COUNTER)),
        item_id=item.item_id,
        annotator=annotator,
        time="2026-01-01T00:00:00+00:00",
        seconds=more.pop("seconds", 4.0),
        order=order or list(range(len(item.row["responses"]))),
        ranks=ranks,
        **more,
    )


def nominal_alpha(units):
    """Krippendorff's alpha for nominal values, by the definition: 1 − observed over expected disagreement."""
    units = [values for values in units if len(values) > 1]
    values = [value for unit in units for value in unit]
    observed = sum(
        sum(a != b for a, b in itertools.permutations(unit, 2)) / (len(unit) - 1) for unit in units
    ) / len(values)
    expected = sum(a != b for a, b in itertools.permutations(values, 2)) / (len(values) * (len(values) - 1))
    return 1 - observed / expected


def test_alpha_is_that_of_the_definition():
    rng = random.Random(0)
    items = [make_item(number) for number in range(40)]
    judgements = [
        judgement(
            item, annotator, [rng.randint(1, 3) if rng.random() < noise else rank for rank in (1, 2, 3)]
        )
        for item in items
        for annotator, noise in (("ada", 0.2), ("bob", 0.5), ("cy", 0.9))
        if rng.random() < 0.8
    ]
    units = {}
    for one in judgements:
        for first, second in itertools.permutations(range(3), 2):
            difference = one.ranks[second] - one.ranks[first]
            units.setdefault((one.item_id, first, second), []).append((difference > 0) - (difference < 0))
    figures = judgement_figures(items, judgements)
    assert figures["agreement/alpha"] == pytest.approx(nominal_alpha(units.values()), abs=1e-12)
    assert 0.05 < figures["agreement/alpha"] < 0.6


def test_who_agree_have_alpha_one_and_who_guess_none():
    rng = random.Random(1)
    items = [make_item(number) for number in range(200)]
    alike = [
        judgement(item, who, ranks) for item in items for ranks in [rng.sample([1, 2, 3], 3)] for who in "ab"
    ]
    figures = judgement_figures(items, alike)
    assert figures["agreement/alpha"] == 1
    assert figures["agreement/pairwise"] == 1
    rng = random.Random(0)
    guessed = [judgement(item, who, rng.sample([1, 2, 3], 3)) for item in items for who in "ab"]
    figures = judgement_figures(items, guessed)
    assert figures["agreement/alpha"] == pytest.approx(0, abs=0.15)  # standard deviation 0.045
    assert figures["agreement/pairwise"] == pytest.approx(0.5, abs=0.06)


def test_without_a_shared_item_there_is_no_agreement_to_tell():
    items = [make_item(number) for number in range(4)]
    figures = judgement_figures(
        items, [judgement(item, f"annotator {n}", [1, 2, 3]) for n, item in enumerate(items)]
    )
    assert not any(name.startswith("agreement") for name in figures)
    assert figures["items/by_several"] == 0


def test_bias_of_place_and_of_length():
    rng = random.Random(2)
    items = [make_item(number, num_responses=2) for number in range(400)]

    def judged(prefer):
        made = []
        for item in items:
            order = rng.sample([0, 1], 2)
            best = prefer(order)
            made.append(judgement(item, "ada", [1 if index == best else 2 for index in range(2)], order))
        return judgement_figures(items, made)

    by_place = judged(lambda order: order[0] if rng.random() < 0.8 else order[1])
    assert by_place["bias/first_shown"] == pytest.approx(0.8, abs=0.06)
    assert by_place["bias/first_shown/ci95_low"] > 0.7
    assert by_place["bias/longer"] == pytest.approx(0.5, abs=0.08)
    by_length = judged(lambda order: 1)  # the second response of make_item is the longer
    assert by_length["bias/longer"] == 1
    assert by_length["bias/first_shown"] == pytest.approx(0.5, abs=0.08)


def test_counts_times_flags_and_ratings(capsys):
    items = [make_item(number) for number in range(5)]
    judgements = [
        judgement(items[0], "ada", [1, 2, 3], seconds=2.0, ratings={"quality": [5, None, 1]}),
        judgement(items[0], "bob", [1, 1, 3], seconds=10.0, ratings={"quality": [3, None, None]}),
        judgement(items[1], "ada", None, flag="unsafe", seconds=6.0),
        judgement(make_item(99), "ada", [1, 2, 3]),
    ]
    figures = judgement_figures(items, judgements)
    expected = {
        "judgements": 3,
        "judgements/of_other_files": 1,
        "items/judged": 2,
        "items/left": 3,
        "items/by_several": 1,
        "judgements/by/ada": 2,
        "judgements/by/bob": 1,
        "flagged/unsafe": 1,
        "seconds/median": 6.0,
        "ties/share": 1 / 6,
        "ratings/quality": 3.0,
        "agreement/shared_pairs": 3,
        "agreement/pairwise": 1.0,
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected)
    json.dumps(figures, allow_nan=False)
    print_summary(figures)
    printed = capsys.readouterr().out
    for name in figures:
        assert ("/ci95_" in name) or name in printed
    assert "seconds from" in printed
    assert "not to be told from 3 shared pairs" in printed.replace("\n", " ")


def test_an_empty_log_says_so():
    figures = judgement_figures([make_item(0)], [])
    assert figures["judgements"] == 0
    assert figures["items/left"] == 1
    assert readings(figures) == ["Nothing is judged yet."]


def test_the_summary_says_what_the_figures_mean():
    rng = random.Random(0)
    items = [make_item(number, num_responses=2) for number in range(400)]

    def read(num_items, agree, seconds=9.0):
        made = []
        for item in items[:num_items]:
            best = rng.random() < 0.5
            for who in ("ada", "bob"):
                first = best if rng.random() < agree else rng.random() < 0.5
                made.append(
                    judgement(item, who, [1, 2] if first else [2, 1], rng.sample([0, 1], 2), seconds=seconds)
                )
        return readings(judgement_figures(items, made))

    assert [text[:28] for text in read(400, 1.0)] == ["Agreement: alpha 1.00 is rel"]
    assert "is good enough for tentative" in read(400, 0.85)[0]
    assert "is low" in read(400, 0.3)[0]
    assert "not to be told from 49 shared pairs" in read(49, 0.3)[0]
    assert "is low" in read(50, 0.0)[0]
    assert read(400, 1.0, seconds=0.5)[-1].startswith("Half of the judgements took less than 0.5 seconds")
    alone = judgement_figures(items, [judgement(item, "ada", [2, 1], [0, 1]) for item in items])
    unknown, place, length = readings(alone)
    assert unknown.startswith("Agreement: unknown")
    assert place == "Bias: the response shown first loses more often than not (0% won)."
    assert length == "Bias: the longer response wins more often than not (100% won)."
    ties = [judgement(item, who, [1, 1]) for item in items for who in "ab"]
    assert "every verdict on the shared pairs is a tie" in readings(judgement_figures(items, ties))[0]
