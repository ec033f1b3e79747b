"""Agreement of annotators with one another: by hand, whichever side a pair stands on, and on simulated annotators."""

import random

import pytest

from tieback.reward_model.reliability import MIN_SHARED_PAIRS, Agreement, agreement_with_others


def pair(number: int, chosen: str, rejected: str, annotator: str | None) -> dict:
    said = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    prompt = [{"role": "user", "content": f"Question {number}?"}]
    return {"prompt": prompt, "chosen": said[0], "rejected": said[1], "annotator": annotator}


def test_each_is_held_against_the_majority_of_the_others() -> None:
    alike = range(MIN_SHARED_PAIRS)
    apart = range(MIN_SHARED_PAIRS, 3 * MIN_SHARED_PAIRS)
    rows = [
        *(pair(number, "a", "b", name) for number in alike for name in ("ann", "bob", "cat")),
        # The others of ann are divided, and so are those of bob; cat's are at one.
        *(pair(number, "a", "b", name) for number in apart for name in ("ann", "bob")),
        *(pair(number, "b", "a", "cat") for number in apart),
        pair(100, "a", "b", "ann"),  # shared with nobody
        pair(101, "a", "b", None),
    ]
    found = agreement_with_others(rows)
    once, thrice = MIN_SHARED_PAIRS, 3 * MIN_SHARED_PAIRS
    assert found == {
        "ann": Agreement(1.0, once),
        "bob": Agreement(1.0, once),
        "cat": Agreement(1 / 3, thrice),
    }
    assert agreement_with_others(rows[::-1]) == found
    # One pair fewer, and nothing is said of ann and bob.
    fewer = [row for row in rows if row["prompt"][0]["content"] != "Question 0?"]
    assert list(agreement_with_others(fewer)) == ["cat"]


@pytest.mark.parametrize("seed", range(5))
def test_who_guesses_is_found_among_those_who_mostly_know(seed: int) -> None:
    rng = random.Random(seed)
    know = {"ann": 0.9, "bob": 0.8, "cat": 0.85, "guesses": 0.5}
    rows = []
    for number in range(200):
        for name in rng.sample(sorted(know), 3):
            right = rng.random() < know[name]
            rows.append(pair(number, *(("good", "bad") if right else ("bad", "good")), name))
    agreements = agreement_with_others(rows)
    assert [name for name, agreement in agreements.items() if agreement.share < 0.65] == ["guesses"]
