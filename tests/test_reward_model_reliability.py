"""Agreement of annotators with one another: by hand, whichever side a pair stands on, and on simulated annotators."""

import random

import pytest

from tieback.reward_model.reliability import MIN_SHARED_PAIRS, Agreement, agreement_with_others, unreliable


def pair(number: int, chosen: str, rejected: str, annotator: str | None) -> dict:
    said = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    prompt = [{"role": "user", "content": f"Question {number}?"}]
    return {"prompt": prompt, "chosen": said[0], "rejected": said[1], "annotator": annotator}


def test_each_is_held_against_the_majority_of_the_others() -> None:
    rows = [
        *(pair(0, "a", "b", name) for name in ("ann", "bob", "cat")),
        *(pair(1, "a", "b", name) for name in ("ann", "bob")),
        pair(1, "b", "a", "cat"),
        # The others of ann are divided, and so are those of bob; cat's are at one.
        *(pair(2, "a", "b", name) for name in ("ann", "bob")),
        pair(2, "b", "a", "cat"),
        pair(3, "a", "b", "ann"),  # shared with nobody
        pair(4, "a", "b", None),
    ]
    found = agreement_with_others(rows)
    # ann: pair 0 alike, of pairs 1 and 2 bob says yes and cat no.
    assert found == {"ann": Agreement(1.0, 1), "bob": Agreement(1.0, 1), "cat": Agreement(1 / 3, 3)}
    assert agreement_with_others(rows[::-1]) == found


def test_one_is_unreliable_below_the_share_and_never_on_few_pairs() -> None:
    few, many = MIN_SHARED_PAIRS - 1, MIN_SHARED_PAIRS
    agreements = {"a": Agreement(0.59, many), "b": Agreement(0.6, many), "c": Agreement(0.1, few)}
    assert unreliable(agreements, 0.6) == ["a"]


@pytest.mark.parametrize("seed", range(5))
def test_who_guesses_is_found_among_those_who_mostly_know(seed: int) -> None:
    rng = random.Random(seed)
    know = {"ann": 0.9, "bob": 0.8, "cat": 0.85, "guesses": 0.5}
    rows = []
    for number in range(200):
        for name in rng.sample(sorted(know), 3):
            right = rng.random() < know[name]
            rows.append(pair(number, *(("good", "bad") if right else ("bad", "good")), name))
    assert unreliable(agreement_with_others(rows), 0.65) == ["guesses"]
