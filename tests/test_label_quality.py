"""Known answers mixed in, judgements faster than anyone reads, disagreements settled by others, and what the summary says of all that."""

import itertools
import random

import pytest
from playwright.sync_api import expect
from test_label_agreement import judgement, make_item
from test_label_page import enter, served, shown
from test_label_session import answer_for, judge_all, make_session, read_jsonl, responses_file, write_jsonl

from tieback.cli.errors import UsageError
from tieback.data.errors import DataError
from tieback.pipeline.label import LabelArguments
from tieback.pipeline.labelling.agreement import agreement_matrix, disputed_items, judgement_figures
from tieback.pipeline.labelling.items import Item, read_known, read_responses
from tieback.pipeline.labelling.quality import READ_CHARACTERS_A_SECOND, is_hasty, known_figures, unreliable
from tieback.pipeline.labelling.summary import print_summary, readings


def known_file(tmp_path, count=4):
    rows = [
        {
            "prompt_id": f"k{number}",
            "prompt": [{"role": "user", "content": f"Known {number}?"}],
            "responses": ["a wrong", "b right", "c wrong"],
            "ranks": [2, 1, 2],
        }
        for number in range(count)
    ]
    return write_jsonl(tmp_path / "gold.jsonl", rows)


# Known answers.


def test_known_items_are_mixed_in_unmarked_and_give_no_preferences(tmp_path):
    known = read_known(known_file(tmp_path, count=40))
    session = make_session(tmp_path, count=60, known=known, known_share=0.3)
    views, view = [], session.start("ada")
    while not view.get("finished"):
        views.append(view)
        view = session.judge("ada", view["item_id"], answer_for(view))
    ids = {item.item_id for item in known}
    places = [number for number, each in enumerate(views) if each["item_id"] in ids]
    # 60 items of the file, and about 0.3 of all that was shown: 26 expected, standard deviation 6.
    assert len(views) - len(places) == 60
    assert 10 <= len(places) <= 40
    assert places != list(range(len(places)))
    assert len({frozenset(each) for each in views}) == 1  # nothing in a view tells one from another
    assert all("ranks" not in str(each) for each in views)
    prompts = {row["prompt_id"] for row in read_jsonl(session.output)}
    assert prompts == {f"p{number}" for number in range(60)}
    # The order of the places is the same after a reload, and another for someone else.
    assert session.is_finished()


def test_a_reload_shows_the_same_item_and_progress_counts_what_is_shown(tmp_path):
    known = read_known(known_file(tmp_path))
    session = make_session(tmp_path, count=3, known=known, known_share=1.0)
    first = session.start("ada")
    assert first["item_id"] in {item.item_id for item in known}
    assert session.start("ada")["item_id"] == first["item_id"]
    assert first["progress"] == {"done": 0, "total": 4}
    view = first
    for _ in range(4):
        view = session.judge("ada", view["item_id"], answer_for(view))
    assert view["progress"] == {"done": 4, "total": 7}  # no known one is left


def test_accuracy_is_the_share_of_pairs_with_a_known_order_that_are_ordered_so():
    item = make_item(1)
    known = [Item(item.item_id, item.row | {"ranks": [1, 2, 2]})]
    judgements = [
        judgement(item, "ada", [1, 3, 2]),
        judgement(item, "bob", [2, 1, 2]),
        judgement(item, "cy", None, flag="skip"),
    ]
    figures = known_figures(known, judgements)
    # Of the first against the two others; bob ties one of them and reverses the other.
    assert figures == {
        "gold/accuracy/ada": 1.0,
        "gold/pairs/ada": 2,
        "gold/accuracy/bob": 0.0,
        "gold/pairs/bob": 2,
    }
    both = judgement_figures([item], judgements, known)
    assert both["judgements"] == both["judgements/of_other_files"] == 0
    assert both["gold/accuracy/ada"] == 1.0


def test_the_summary_names_who_is_often_wrong_once_there_are_enough_pairs():
    figures = {
        "judgements": 40,
        "gold/accuracy/ada": 0.55,
        "gold/pairs/ada": 20,
        "gold/accuracy/bob": 0.5,
        "gold/pairs/bob": 19,
    }
    sentences = " ".join(readings(figures))
    assert "ada orders 55% of the 20 pairs with a known order as known" in sentences
    assert "bob" not in sentences


def test_known_items_without_an_order_are_refused(tmp_path):
    for ranks in (None, [1, 1, 1]):
        path = write_jsonl(
            tmp_path / "gold.jsonl", [{"prompt": "?", "responses": ["a", "b", "c"], "ranks": ranks}]
        )
        with pytest.raises(DataError, match="the known ranking is missing, or has no order"):
            read_known(path)
    with pytest.raises(UsageError, match="cannot be mixed into --compare"):
        LabelArguments(output="a.jsonl", compare="b.jsonl", gold="c.jsonl")


def test_annotators_who_often_get_known_answers_wrong_give_no_preferences(tmp_path):
    known = read_known(known_file(tmp_path, count=40))
    session = make_session(tmp_path, count=60, overlap=1.0, known=known, known_share=0.5, leave_out_below=0.7)

    def judge(annotator, best):
        view = session.start(annotator)
        while not view.get("finished"):
            ranks = [1 if text.startswith(best) else 2 for text in view["responses"]]
            answer = answer_for(view) if "answer" in view["responses"][0] else {"ranks": ranks}
            view = session.judge(annotator, view["item_id"], answer)

    judge("ada", "b")
    judge("eve", "a")  # puts a wrong one first
    assert {row["annotator"] for row in read_jsonl(session.output)} == {"ada"}
    judgements = list(session.log.judgements.values())
    assert unreliable(known, judgements, 0.7) == {"eve"}
    assert unreliable(known, judgements, 0.0) == set()
    # From few pairs nothing is told of anyone.
    assert unreliable(known[:5], judgements, 0.7) == set()
    with pytest.raises(UsageError, match="--leave_out_below is measured by items with known ranks"):
        LabelArguments(output="a.jsonl", responses="b.jsonl", leave_out_below=0.5)


# Faster than anyone reads.


def test_whoever_is_faster_than_reading_is_hasty():
    item = Item("i", {"prompt": "x" * 100, "responses": ["y" * 400, "z" * 400]})
    limit = 900 / READ_CHARACTERS_A_SECOND
    assert is_hasty(judgement(item, "ada", [1, 2], seconds=limit - 0.1), item)
    assert not is_hasty(judgement(item, "ada", [1, 2], seconds=limit + 0.1), item)
    # Unknown, and put aside.
    assert not is_hasty(judgement(item, "ada", [1, 2], seconds=0.0), item)
    assert not is_hasty(judgement(item, "ada", None, seconds=0.1, flag="skip"), item)


def test_hasty_judgements_are_counted_and_can_be_left_out(tmp_path):
    # Judged by a program, each in milliseconds.
    session = make_session(tmp_path, count=4, leave_out_hasty=True)
    judge_all(session, "ada")
    judgements = list(session.log.judgements.values())
    assert len(judgements) == 4
    assert judgement_figures(session.items, judgements)["hasty/ada"] == 4
    assert read_jsonl(session.output) == []
    # What a flag leaves out comes back without it, and goes again, before anyone judges.
    assert len(read_jsonl(make_session(tmp_path, count=4).output)) == 4 * 3
    assert read_jsonl(make_session(tmp_path, count=4, leave_out_hasty=True).output) == []


# Disagreements.


def disputed_session(tmp_path, **settings):
    """Four items that ada and bob have judged, of which two are disputed."""
    session = make_session(tmp_path, count=4, overlap=1.0)
    judge_all(session, "ada")
    view = session.start("bob")
    for number in range(4):
        key = (lambda text: text) if number < 2 else (lambda text: [-ord(sign) for sign in text])
        view = session.judge("bob", view["item_id"], answer_for(view, key))
    return session, make_session(tmp_path, count=4, adjudicate=True, **settings)


def test_items_of_disagreement_come_back_to_others_blind_and_the_outcome_replaces_what_was_said(tmp_path):
    before, session = disputed_session(tmp_path)
    disputed = disputed_items(list(before.log.judgements.values()))
    assert len(disputed) == 2
    assert session.start("ada").get("finished")  # who has judged it cannot settle it
    view = session.start("eve")
    assert not {"ada", "bob"} & set(str(view).split("'"))
    assert view["progress"] == {"done": 0, "total": 2}
    seen = judge_all(session, "eve")
    assert set(seen) == disputed
    assert session.is_finished()
    rows = read_jsonl(session.output)
    settled = [row for row in rows if row.get("adjudicated")]
    assert {row["annotator"] for row in settled} == {"eve"}
    assert len(settled) == 2 * 3
    # Of the other two items both annotators' pairs stay.
    assert len(rows) - len(settled) == 2 * 2 * 3
    assert {row["annotator"] for row in rows if not row.get("adjudicated")} == {"ada", "bob"}
    figures = judgement_figures(session.items, list(session.log.judgements.values()))
    assert figures["adjudicated"] == 2
    assert "items/disputed" not in figures
    session.undo("eve")
    assert judgement_figures(session.items, list(session.log.judgements.values()))["items/disputed"] == 1


def test_an_item_is_settled_once_and_a_tie_disputes_nothing(tmp_path):
    _, session = disputed_session(tmp_path)
    first = session.start("eve")
    assert session.start("fay")["item_id"] != first["item_id"]
    session.judge("eve", first["item_id"], answer_for(first))
    rest = judge_all(session, "fay")
    assert len(rest) == 1
    item = make_item(3)
    assert disputed_items([judgement(item, "ada", [1, 2, 3]), judgement(item, "bob", [1, 1, 1])]) == set()
    assert disputed_items([judgement(item, "ada", [1, 2, 3]), judgement(item, "bob", [2, 1, 3])]) == {
        item.item_id
    }


def test_who_skips_an_adjudication_settles_nothing_and_adjudications_are_no_agreement(tmp_path):
    before, session = disputed_session(tmp_path)
    agreement = agreement_matrix(before.items, list(before.log.judgements.values()))
    rows = read_jsonl(before.output)
    view = session.start("eve")
    for _ in range(2):
        view = session.judge("eve", view["item_id"], {"ranks": None, "flag": "skip"})
    assert view["finished"]
    assert not session.is_finished()
    assert read_jsonl(session.output) == rows
    assert len(judge_all(session, "fay")) == 2
    assert session.is_finished()
    assert agreement_matrix(session.items, list(session.log.judgements.values())) == agreement


def test_the_matrix_is_that_of_counting():
    rng = random.Random(1)
    items = [make_item(number) for number in range(12)]
    judgements = [
        judgement(item, annotator, [rng.randint(1, 3) for _ in range(3)])
        for item in items
        for annotator in ("ada", "bob", "cy")
        if rng.random() < 0.7
    ]
    expected = {}
    for one, other in itertools.combinations(("ada", "bob", "cy"), 2):
        alike = []
        for item in items:
            by = {j.annotator: j.ranks for j in judgements if j.item_id == item.item_id}
            if one in by and other in by:
                for first, second in itertools.combinations(range(3), 2):
                    signs = [
                        (ranks[second] > ranks[first]) - (ranks[second] < ranks[first])
                        for ranks in (by[one], by[other])
                    ]
                    if all(signs):
                        alike.append(signs[0] == signs[1])
        expected[one, other] = (pytest.approx(sum(alike) / len(alike)), len(alike))
    assert agreement_matrix(items, judgements) == expected


def test_the_matrix_is_printed_and_names_are_text(capsys):
    print_summary({"judgements": 2, "judgements/by/[red]x": 2}, {("[red]x", "ada"): (0.5, 8)})
    out = capsys.readouterr().out
    assert "judgements/by/[red]x" in out
    assert "[red]x" in out.split("share of the pairs ordered alike")[0]
    assert "0.50 (8)" in out


def test_in_a_browser_known_items_look_like_any_other(browser, tmp_path):
    known = read_known(known_file(tmp_path, count=1))
    items = read_responses(responses_file(tmp_path, count=1))
    with served(items, tmp_path / "preferences.jsonl", known=known, known_share=1.0) as url:
        page = enter(browser, url)
        expect(page.locator(".prompt")).to_contain_text("Known 0?")
        assert "gold" not in page.content().lower().replace("golden", "")
        for text in shown(page):
            page.keyboard.press("1" if text == "b right" else "2")
        page.keyboard.press("Enter")
        expect(page.locator(".prompt")).to_contain_text("Question 0?")
        page.close()
