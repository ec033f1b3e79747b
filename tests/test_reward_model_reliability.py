"""Agreement of annotators with one another: by hand, whichever side a pair stands on, and on simulated annotators."""

import random

import pytest

from tieback.reward_model.reliability import MIN_SHARED_PAIRS, Agreement, agreement_with_others, merge_votes


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


def test_votes_on_a_pair_become_one_row_where_enough_of_them_agree() -> None:
    votes = {0: "+", 1: "++", 2: "++-", 3: "--+", 4: "+-", 5: "----+", 6: "---"}
    rows = [
        pair(number, *(("a", "b") if vote == "+" else ("b", "a")), f"{vote}{place}")
        for number, signs in votes.items()
        for place, vote in enumerate(signs)
    ]

    def merged(share: float) -> dict[int, str]:
        kept, disputed = merge_votes(rows, share)
        assert len(kept) + disputed == len(votes)
        return {
            int(rows[row]["prompt"][0]["content"][9:-1]): "+"
            if rows[row]["chosen"][0]["content"] == "a"
            else "-"
            for row in kept
        }

    majority = {0: "+", 1: "+", 2: "+", 3: "-", 5: "-", 6: "-"}  # 4 is a draw
    assert merged(0.5) == majority
    assert merged(2 / 3) == majority
    assert merged(0.7) == {number: sign for number, sign in majority.items() if number not in (2, 3)}
    assert merged(1.0) == {0: "+", 1: "+", 6: "-"}
    # The same two texts after another prompt are another pair.
    assert merge_votes([pair(0, "a", "b", "ann"), pair(1, "b", "a", "ann")], 1.0) == ([0, 1], 0)


@pytest.mark.parametrize("seed", range(3))
def test_pairs_on_which_all_agree_are_the_surest(seed: int) -> None:
    rng = random.Random(seed)
    rows = []
    for number in range(3000):
        for name in ("ann", "bob", "cat"):
            rows.append(pair(number, *(("good", "bad") if rng.random() < 0.8 else ("bad", "good")), name))

    def right(share: float) -> tuple[float, float]:
        kept, _ = merge_votes(rows, share)
        return sum(rows[row]["chosen"][0]["content"] == "good" for row in kept) / len(kept), len(kept) / 3000

    # p = 0.8: all three agree with p³ + (1 − p)³ = 0.52 and are then right with p³ / 0.52; two of three are right with p³ + 3p²(1 − p).
    within = 4 * 0.5 / 3000**0.5
    assert right(1.0) == (pytest.approx(0.512 / 0.52, abs=within), pytest.approx(0.52, abs=within))
    assert right(0.5) == (pytest.approx(0.896, abs=within), 1.0)
