"""The labelling page in a real browser: what a person does, what they see, and what must not happen."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
from playwright.sync_api import Page, expect
from test_label_session import read_jsonl, responses_file, write_jsonl

from tieback.pipeline.label import open_log
from tieback.pipeline.labelling.items import read_comparisons, read_responses
from tieback.pipeline.labelling.page import build_page, open_page
from tieback.pipeline.labelling.session import Session


@contextmanager
def served(items, output, auth=None, **settings):
    page = build_page(Session(items, open_log(output), output, **settings), "Tieback")
    try:
        yield open_page(page, "127.0.0.1", None, auth)
    finally:
        page.close(verbose=False)


def enter(browser, url, name="ada", **context) -> Page:
    page = browser.new_page(**context)
    page.goto(url)
    page.get_by_label("Your name").fill(name)
    page.keyboard.press("Enter")
    expect(page.locator(".response").first).to_be_visible()
    return page


def shown(page):
    return [text.strip() for text in page.locator(".response .prose").all_inner_texts()]


def expect_done(page, count, total):
    expect(page.locator(".count")).to_have_text(f"{count} of {total}")


def rank_by_keyboard(page, key=None):
    """Type the rank of each response in turn, the best of them by `key` of its text first, and submit."""
    best_first = sorted(shown(page), key=key)
    for text in shown(page):
        page.keyboard.press(str(best_first.index(text) + 1))
    page.keyboard.press("Enter")


def test_ranking_by_mouse(browser, tmp_path):
    items = read_responses(responses_file(tmp_path, count=1))
    with served(items, tmp_path / "preferences.jsonl") as url:
        page = enter(browser, url)
        for card, rank in zip(page.locator(".response").all(), ("3", "1", "2"), strict=True):
            card.locator(".rank", has_text=rank).click()
        page.locator(".response").nth(1).get_by_title("helpfulness 4 of 5").click()
        page.get_by_role("button", name="Submit").click()
        expect(page.get_by_text("All done")).to_be_visible()
    (judgement,) = open_log(tmp_path / "preferences.jsonl").judgements.values()
    assert [judgement.ranks[index] for index in judgement.order] == [3, 1, 2]
    assert [judgement.ratings["helpfulness"][index] for index in judgement.order] == [None, 4, None]


def start_server(tmp_path, port, *flags):
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "pipeline.label", "--responses", str(tmp_path / "responses.jsonl")),
            *("--output", str(tmp_path / "preferences.jsonl"), "--port", str(port), *flags),
        ],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    url = re.search(r"http://\S+", process.stdout.readline())[0]
    return process, url


@pytest.mark.slow
def test_the_server_may_be_killed_at_any_moment(browser, tmp_path):
    responses_file(tmp_path, count=6)
    port = random.randint(20000, 30000)
    server, url = start_server(tmp_path, port)
    page = enter(browser, url)
    rank_by_keyboard(page)
    expect_done(page, 1, 6)
    server.send_signal(signal.SIGKILL)
    server.wait()
    before = shown(page)
    rank_by_keyboard(page)
    expect(page.locator(".message")).to_contain_text("the server does not answer")
    server, _ = start_server(tmp_path, port, "--until_finished", "True")
    # The same page, with what was chosen still on it.
    assert shown(page) == before
    page.keyboard.press("Enter")
    expect_done(page, 2, 6)
    # The browser dies; another one goes on where it stopped.
    page.close()
    page = enter(browser, url)
    expect_done(page, 2, 6)
    for done in range(2, 6):
        expect_done(page, done, 6)
        rank_by_keyboard(page)
    expect(page.get_by_text("All done")).to_be_visible()
    assert server.wait(timeout=30) == 0, "with nothing left to judge it ends by itself"
    assert len(read_jsonl(tmp_path / "preferences.jsonl")) == 18


def test_a_page_that_is_loaded_anew_goes_on_with_what_was_chosen(browser, tmp_path):
    items = read_responses(responses_file(tmp_path, count=3))
    with served(items, tmp_path / "preferences.jsonl") as url:
        page = enter(browser, url)
        before = shown(page)
        for key in ("2", "1", "q", "4", "n"):
            page.keyboard.press(key)
        page.keyboard.type("half done")
        page.reload()
        expect(page.locator(".response").first).to_be_visible()
        assert shown(page) == before
        assert page.locator(".rank.chosen").all_inner_texts() == ["2", "1"]
        assert page.get_by_label("Note").input_value() == "half done"
        page.locator(".response").nth(2).get_by_role("button", name="3", exact=True).first.click()
        page.keyboard.press("Enter")
        expect_done(page, 1, 3)
        page.get_by_title("Someone else judges").click()
        page.get_by_label("Your name").fill("bob")
        page.keyboard.press("Enter")
        expect(page.get_by_title("Someone else judges")).to_have_text("bob")
        assert page.locator(".rank.chosen").count() == 0
    (judgement,) = open_log(tmp_path / "preferences.jsonl").judgements.values()
    assert [judgement.ranks[index] for index in judgement.order] == [2, 1, 3]
    assert [judgement.ratings["quality"][index] for index in judgement.order] == [None, None, 4]
    assert judgement.note == "half done"


def test_two_annotators_at_once(browser, tmp_path):
    items = read_responses(responses_file(tmp_path, count=12))
    with served(items, tmp_path / "preferences.jsonl", overlap=0.3) as url:
        pages = {name: enter(browser, url, name) for name in ("ada", "bob")}
        left = set(pages)
        while left:
            for name in sorted(left):
                if pages[name].get_by_text("All done").is_visible():
                    left.discard(name)
                    continue
                done = pages[name].locator(".count").inner_text()
                rank_by_keyboard(pages[name])
                expect(pages[name].locator(".count")).not_to_have_text(done)
    judgements = open_log(tmp_path / "preferences.jsonl").judgements.values()
    by = {name: {j.item_id for j in judgements if j.annotator == name} for name in pages}
    session = Session(items, open_log(tmp_path / "preferences.jsonl"), tmp_path / "x.jsonl", overlap=0.3)
    shared = {item.item_id for item in items if session._is_shared(item)}
    assert by["ada"] | by["bob"] == {item.item_id for item in items}
    assert by["ada"] & by["bob"] == shared
    assert 0 < len(shared) < 12
    assert len(read_jsonl(tmp_path / "preferences.jsonl")) == 3 * (12 + len(shared))


HOSTILE = (
    "<script>document.title = 'pwned'</script>",
    "<img src=x onerror=\"document.title = 'pwned'\">",
    "</div></section><h1>not a heading</h1>",
    "{{value}} ${document.title = 'pwned'} <svg onload=alert(1)>",
    '```html\n<iframe src="javascript:alert(1)"></iframe>\n```',
    "[click](javascript:alert(1)) \u202egnp.exe",
)


def test_what_a_model_or_a_person_wrote_does_nothing(browser, tmp_path):
    row = {"prompt_id": "p", "prompt": [{"role": "user", "content": HOSTILE[0]}], "responses": list(HOSTILE)}
    items = read_responses(write_jsonl(tmp_path / "responses.jsonl", [row]))
    with served(items, tmp_path / "preferences.jsonl") as url:
        page = browser.new_page()
        foreign, dialogs = [], []
        page.on("request", lambda request: foreign.append(request.url))
        page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        page.goto(url)
        name = "<img src=x onerror=alert(2)>"
        page.get_by_label("Your name").fill(name)
        page.keyboard.press("Enter")
        expect(page.locator(".response")).to_have_count(6)
        visible = page.locator(".desk").inner_text()
        for text in HOSTILE[:4]:
            assert text in visible
        assert name in visible
        assert '<iframe src="javascript:alert(1)"></iframe>' in visible
        page.keyboard.press("n")
        page.keyboard.type(HOSTILE[1])
        page.keyboard.press("Escape")
        for rank in "123456":
            page.keyboard.press(rank)
        page.keyboard.press("Enter")
        expect(page.get_by_text("All done")).to_be_visible()
        page.keyboard.press("u")
        expect(page.locator(".response")).to_have_count(6)
        assert page.title() == "Tieback"
        assert page.locator(".desk").locator("script, img, iframe, svg, h1:not(.title)").count() == 0
        assert dialogs == []
        # And the page asks nothing of any other machine.
        assert [address for address in foreign if not address.startswith((url, "data:", "blob:"))] == []
    (judgement,) = [
        j for j in read_jsonl(tmp_path / "preferences.judgements.jsonl") if j["event"] == "judged"
    ]
    assert judgement["annotator"] == name
    assert judgement["note"] == HOSTILE[1]


def test_headings_and_messages_are_there_for_a_screen_reader(browser, tmp_path):
    items = read_responses(responses_file(tmp_path, count=1))
    with served(items, tmp_path / "preferences.jsonl") as url:
        page = browser.new_page()
        page.goto(url)
        heading = page.get_by_role("heading", level=1)
        expect(heading).to_have_text("Who is judging?")
        page.keyboard.press("Enter")
        message = page.locator(".desk").get_by_role("status")
        expect(message).to_have_text("Enter a name.")
        expect(message).to_have_attribute("aria-live", "polite")
        page.get_by_label("Your name").fill("ada")
        page.keyboard.press("Enter")
        expect(heading).to_have_text("Rank the responses")
        expect(page.get_by_role("heading", level=2)).to_have_text(["Response A", "Response B", "Response C"])
        rank_by_keyboard(page)
        expect(heading).to_have_text("All done. Thank you.")


def test_no_file_is_taken(tmp_path, monkeypatch):
    store = tmp_path / "gradio"
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(store))
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nhello\r\n--x--\r\n'
    with served(read_responses(responses_file(tmp_path)), tmp_path / "preferences.jsonl") as url:
        request = urllib.request.Request(
            f"{url}gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"}
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
    assert refused.value.code == 413
    assert not [path for path in store.rglob("*") if path.is_file()]


def test_no_file_can_be_fetched_and_a_password_is_asked_for(tmp_path):
    responses = responses_file(tmp_path)
    items = read_responses(responses)

    def status(address, data=None):
        try:
            request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
            return urllib.request.urlopen(request).status
        except urllib.error.HTTPError as error:
            return error.code

    with served(items, tmp_path / "preferences.jsonl") as url:
        for path in (str(responses), "/etc/passwd", "../../../../etc/passwd", "pyproject.toml"):
            for prefix in ("gradio_api/file=", "file=", "static/", "assets/", "gradio_api/file/"):
                assert status(f"{url}{prefix}{path}") in (400, 403, 404, 405)
    with served(items, tmp_path / "preferences.jsonl", auth=("annotator", "secret")) as url:
        call = json.dumps(
            {"session_hash": "x", "component_id": 1, "fn_name": "start", "data": {"annotator": "eve"}}
        )
        assert status(f"{url}gradio_api/component_server", call.encode()) == 401
        assert status(f"{url}config") == 401
    assert not (tmp_path / "preferences.judgements.jsonl").exists()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_everything_without_scrolling_sideways(browser, tmp_path, scheme):
    long = {
        "prompt_id": "p",
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Why? " * 200},
        ],
        "responses": ["word " * 2000, "x" * 3000, "```\n" + "print('long line') " * 40 + "\n```"],
    }
    items = read_responses(write_jsonl(tmp_path / "responses.jsonl", [long]))
    with served(items, tmp_path / "preferences.jsonl") as url:
        page = enter(browser, url, viewport={"width": 360, "height": 740}, color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        for box in page.locator(".response .scroll, .prompt").all():
            assert box.bounding_box()["height"] <= 0.5 * 740, "a long text scrolls in its own box"
        for chip in page.locator("button.rank").all():
            assert min(chip.bounding_box()[side] for side in ("width", "height")) >= 36
        box = page.get_by_role("button", name="Submit").bounding_box()
        assert box["y"] + box["height"] <= 740, "Submit is at hand however long the texts"
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 3 * 64) == (scheme == "dark")


def test_two_policies_are_compared_blind(browser, tmp_path):
    rows = [
        {
            "prompt": f"Question {n}?",
            "sft": {"response": f"sft says {n}"},
            "ppo": {"response": f"ppo says {n}"},
        }
        for n in range(8)
    ]
    items = read_comparisons(write_jsonl(tmp_path / "samples.jsonl", rows))
    with served(items, tmp_path / "comparisons.jsonl", side_by_side=True) as url:
        page = enter(browser, url, viewport={"width": 1000, "height": 700})
        left, right = (card.bounding_box() for card in page.locator(".response").all())
        assert left["x"] + left["width"] <= right["x"]
        assert left["y"] == right["y"]
        # A tie is one answer of three, not the page's main one.
        colours = [
            page.get_by_role("button", name=name, exact=True).evaluate(
                "b => getComputedStyle(b).backgroundColor"
            )
            for name in ("Tie", "Undo")
        ]
        assert colours[0] == colours[1]
        # Not a side that was chosen but could not be sent: it shows nowhere on the page.
        page.context.set_offline(True)
        page.keyboard.press("1")
        expect(page.locator(".message")).to_contain_text("Not saved")
        page.keyboard.press("n")
        page.keyboard.type("hm")
        page.context.set_offline(False)
        page.reload()
        expect(page.get_by_label("Note")).to_have_value("hm")
        page.keyboard.press("Enter")
        expect(page.locator(".message")).to_contain_text("Choose the left")
        sides = set()
        for done in range(6):
            expect_done(page, done, 8)
            ppo_is_left = shown(page)[0].startswith("ppo")
            sides.add(ppo_is_left)
            page.keyboard.press(
                ("ArrowLeft" if done % 2 else "1") if ppo_is_left else ("ArrowRight" if done % 2 else "2")
            )
        expect_done(page, 6, 8)
        page.keyboard.press("t")
        expect_done(page, 7, 8)
        page.keyboard.press("u")
        expect_done(page, 6, 8)
        page.keyboard.press("0")
        expect_done(page, 7, 8)
        page.locator(".response", has_text="sft says").get_by_role("button", name="This is better").click()
        expect(page.get_by_text("All done")).to_be_visible()
    assert sides == {True, False}
    judgements = list(open_log(tmp_path / "comparisons.jsonl").judgements.values())
    assert [judgement.ranks for judgement in judgements] == [[2, 1]] * 6 + [[1, 1], [1, 2]]
