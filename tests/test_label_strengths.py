"""Several policies compared two at a time: the items, the strengths, and what a person sees."""

import itertools
import math
import random
import sys

import numpy as np
import pytest
from playwright.sync_api import expect
from test_label_agreement import judgement
from test_label_page import enter, served
from test_label_session import read_jsonl, write_jsonl

from tieback.data.errors import DataError
from tieback.pipeline import label
from tieback.pipeline.labelling.items import Item, content_hash, read_comparisons
from tieback.pipeline.labelling.strengths import bradley_terry, strengths


def evaluation(tmp_path, run, prompts=(0, 1, 2)):
    rows = [
        {
            "prompt": f"Question {number}?",
            "sft": {"response": f"sft {number}"},
            "ppo": {"response": f"{run} {number}"},
        }
        for number in prompts
    ]
    folder = tmp_path / run / "evaluate"
    folder.mkdir(parents=True, exist_ok=True)
    return write_jsonl(folder / "samples.jsonl", rows)


def test_each_two_policies_meet_at_each_prompt_that_all_evaluations_have(tmp_path):
    paths = [
        evaluation(tmp_path, "first"),
        evaluation(tmp_path, "second", (2, 1, 7)),
        evaluation(tmp_path, "third"),
    ]
    items = read_comparisons(*paths)
    met = sorted((item.row["prompt"], *pair) for item in items for pair in item.row["systems"])
    pairs = itertools.combinations(("sft", "first", "second", "third"), 2)
    assert met == sorted((f"Question {number}?", *pair) for pair in pairs for number in (1, 2))
    for item in items:
        number = item.row["prompt"][9]
        assert item.row["responses"] == [f"{name} {number}" for name in item.row["systems"][0]]
    # Prompts and policies are mixed, so that a session which ends early has some of each.
    assert len({item.row["prompt"] for item in items[:7]}) == 2


def test_runs_of_one_name_are_told_apart_and_faults_named(tmp_path):
    paths = [evaluation(tmp_path / side, "run") for side in ("left", "right")]
    items = read_comparisons(*paths)
    # Both wrote the same: what is said of their texts is said of both, and they are not compared.
    assert [item.row["systems"] for item in items] == [[("sft", "left/run"), ("sft", "right/run")]] * 3
    with pytest.raises(DataError, match=r"no prompt in common with .*evaluate both on the same ones"):
        read_comparisons(paths[0], evaluation(tmp_path, "other", (8, 9)))
    with pytest.raises(DataError, match="the same evaluation is named twice"):
        read_comparisons(paths[0], paths[0])


def test_two_rows_of_one_prompt_are_two_items_of_one_evaluation(tmp_path):
    rows = [{"prompt": "?", "sft": {"response": f"a{n}"}, "ppo": {"response": f"b{n}"}} for n in range(2)]
    assert len(read_comparisons(write_jsonl(tmp_path / "samples.jsonl", rows))) == 2


def test_of_two_policies_the_difference_is_the_log_odds():
    fitted = bradley_terry(np.array([[0.0, 59.5], [19.5, 0.0]]))
    assert fitted.sum() == pytest.approx(0, abs=1e-12)
    # Half a win is added in each direction.
    assert fitted[0] - fitted[1] == pytest.approx(math.log(60 / 20), abs=1e-8)


def test_the_likelihood_is_greatest_at_what_is_found():
    rng = np.random.default_rng(0)
    wins = rng.integers(1, 30, size=(4, 4)).astype(float)
    np.fill_diagonal(wins, 0)

    def loss(strength):
        difference = strength[:, None] - strength[None, :]
        return ((wins + 0.5 * (1 - np.eye(4))) * np.log1p(np.exp(-difference))).sum()

    fitted = bradley_terry(wins)
    for _ in range(200):
        step = rng.normal(scale=0.01, size=4)
        assert loss(fitted + step - step.mean()) >= loss(fitted) - 1e-9


def make_items(count, names):
    items = []
    for number in range(count):
        for pair in itertools.combinations(names, 2):
            responses = [f"{name} {number}" for name in pair]
            row = {"prompt": f"{number}?", "responses": responses, "systems": [pair]}
            items.append(Item(content_hash(row["prompt"], responses), row))
    return items


def test_strengths_that_were_drawn_from_are_found_within_their_intervals():
    true = {"a": 1.0, "b": 0.2, "c": -0.2, "d": -1.0}
    items, rng = make_items(80, list(true)), random.Random(3)
    judgements = []
    for item in items:
        ((one, other),) = item.row["systems"]
        first_wins = rng.random() < 1 / (1 + math.exp(true[other] - true[one]))
        judgements.append(judgement(item, "ada", [1, 2] if first_wins else [2, 1]))
    found = strengths(items, judgements)
    assert [each.policy for each in found][0::3] == ["a", "d"]
    for each in found:
        assert each.low < true[each.policy] < each.high
        assert each.high - each.low < 1.2
        assert each.comparisons == 240
    assert sum(each.strength for each in found) == pytest.approx(0, abs=1e-9)


def test_ties_are_half_a_win_each_flags_none_and_nothing_gives_nothing():
    items = make_items(2, ["a", "b"])
    ties = [judgement(items[0], "ada", [1, 1]), judgement(items[1], "ada", None, flag="skip")]
    found = strengths(items, ties)
    assert [(each.strength, each.won, each.comparisons) for each in found] == [(0, 0.5, 1), (0, 0.5, 1)]
    assert strengths(items, []) == []


@pytest.mark.slow
def test_a_person_compares_three_policies_and_the_summary_ranks_them(browser, tmp_path, monkeypatch, capsys):
    paths = [evaluation(tmp_path, "bad"), evaluation(tmp_path, "good")]
    items, output = read_comparisons(*paths), tmp_path / "compared.jsonl"
    order = ("good", "sft", "bad")
    with served(items, output, side_by_side=True) as url:
        page = enter(browser, url)
        for done in range(9):
            expect(page.locator(".count")).to_have_text(f"{done} of 9")
            left, right = page.locator(".response .written").all_text_contents()
            better = order.index(left.split()[0]) < order.index(right.split()[0])
            page.keyboard.press("ArrowLeft" if better else "ArrowRight")
        expect(page.get_by_text("All done")).to_be_visible()
        page.close()
    assert all("systems" not in row for row in read_jsonl(output))
    flags = ["--compare", *map(str, paths), "--output", str(output), "--summary"]
    monkeypatch.setattr(sys, "argv", ["label.py", *flags])
    label.main()
    table = capsys.readouterr().out.split("Bradley")[0].splitlines()[-8:]
    rows = [line for line in table if any(name in line for name in order)]
    assert [next(name for name in order if name in line) for line in rows] == list(order)
    assert "100%" in rows[0]
