"""The labelling page by the keyboard alone, which is how people label for hours."""

from playwright.sync_api import expect
from test_label_page import enter, expect_done, rank_by_keyboard, served, shown
from test_label_session import read_jsonl, responses_file, write_jsonl

from tieback.pipeline.label import open_log
from tieback.pipeline.labelling.items import read_comparisons, read_responses


def test_twenty_items_are_ranked_by_keyboard_alone(browser, tmp_path):
    items = read_responses(responses_file(tmp_path, count=20, num_responses=4))
    with served(items, tmp_path / "preferences.jsonl") as url:
        page = enter(browser, url)
        for done in range(20):
            expect_done(page, done, 20)
            rank_by_keyboard(page)
        expect(page.get_by_text("All done")).to_be_visible()
    rows = read_jsonl(tmp_path / "preferences.jsonl")
    assert len(rows) == 20 * 6
    assert all(row["chosen"][0]["content"] < row["rejected"][0]["content"] for row in rows)
    assert {row["annotator"] for row in rows} == {"ada"}
    log = open_log(tmp_path / "preferences.jsonl")
    assert all(0 < judgement.seconds < 60 for judgement in log.judgements.values())


def test_undo_skip_flags_note_and_ratings_by_keyboard(browser, tmp_path):
    items = read_responses(responses_file(tmp_path, count=6))
    with served(items, tmp_path / "preferences.jsonl") as url:
        page = enter(browser, url)
        page.keyboard.press("Enter")
        expect(page.locator(".message")).to_contain_text("Rank every response first")
        first = shown(page)
        page.keyboard.press("q")
        page.keyboard.press("5")
        page.keyboard.press("n")
        page.keyboard.type("u and s are letters here")
        page.keyboard.press("Escape")
        for key in ("2", "1", "1"):
            page.keyboard.press(key)
        page.keyboard.press("Enter")
        expect_done(page, 1, 6)
        page.keyboard.press("u")
        expect_done(page, 0, 6)
        assert shown(page) == first
        assert page.locator(".rank.chosen").all_inner_texts() == ["2", "1", "1"]
        assert page.get_by_label("Note").input_value() == "u and s are letters here"
        page.keyboard.press("ArrowDown")
        page.keyboard.press("2")
        page.keyboard.press("Enter")
        for done, key in enumerate(("s", "x", "b", "a"), start=1):
            expect_done(page, done, 6)
            page.keyboard.press(key)
        expect_done(page, 5, 6)
    judgements = list(open_log(tmp_path / "preferences.jsonl").judgements.values())
    assert [judgement.flag for judgement in judgements] == [None, "skip", "unsafe", "broken", "all bad"]
    ranked = judgements[0]
    assert [ranked.ranks[index] for index in ranked.order] == [2, 2, 1]
    assert [ranked.ratings["quality"][index] for index in ranked.order] == [5, None, None]
    assert ranked.note == "u and s are letters here"
    assert len(read_jsonl(tmp_path / "preferences.jsonl")) == 2  # of the three pairs one is tied


def test_a_key_that_is_held_down_judges_one_item(browser, tmp_path):
    rows = [
        {"prompt": f"Question {n}?", "sft": {"response": f"this {n}"}, "ppo": {"response": f"that {n}"}}
        for n in range(8)
    ]
    items = read_comparisons(write_jsonl(tmp_path / "samples.jsonl", rows))
    with served(items, tmp_path / "comparisons.jsonl", side_by_side=True) as url:
        page = enter(browser, url)
        for done, key in enumerate(("1", "t", "s"), start=1):
            page.keyboard.down(key)
            expect_done(page, done, 8)
            for _ in range(5):  # as the keyboard repeats it
                page.keyboard.down(key)
                page.wait_for_timeout(50)
            page.keyboard.up(key)
        page.keyboard.down("u")
        expect_done(page, 2, 8)
        for _ in range(5):
            page.keyboard.down("u")
            page.wait_for_timeout(50)
        page.keyboard.up("u")
        page.keyboard.press("2")
        expect_done(page, 3, 8)
    assert len(open_log(tmp_path / "comparisons.jsonl").judgements) == 3


def test_several_judgements_are_taken_back_at_once(browser, tmp_path):
    items = read_responses(responses_file(tmp_path, count=6))
    replies = ["3", "three", "99"]
    with served(items, tmp_path / "preferences.jsonl") as url:
        page = enter(browser, url)
        page.on("dialog", lambda dialog: dialog.accept(replies.pop(0)))
        texts = []
        for done in range(5):
            expect_done(page, done, 6)
            texts.append(shown(page))
            rank_by_keyboard(page)
        expect_done(page, 5, 6)
        page.keyboard.press("Shift+U")
        expect_done(page, 2, 6)
        assert shown(page) == texts[2]
        assert len(page.locator(".rank.chosen").all()) == 3
        page.get_by_role("button", name="Undo several").click()
        expect(page.locator(".desk").get_by_role("status")).to_have_text("Enter a whole number from 1.")
        expect_done(page, 2, 6)
        page.get_by_role("button", name="Undo several").click()
        expect_done(page, 0, 6)
        assert shown(page) == texts[0]
    assert not open_log(tmp_path / "preferences.jsonl").judgements
    assert read_jsonl(tmp_path / "preferences.jsonl") == []
