"""Judging without a browser: who is shown what, what is kept, and the preference rows that come of it."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from tieback.cli.errors import UsageError
from tieback.data.errors import DataError
from tieback.data.sources import load_rows
from tieback.pipeline import label
from tieback.pipeline.label import LabelArguments, open_log
from tieback.pipeline.labelling.items import read_comparisons, read_responses
from tieback.pipeline.labelling.judgements import JudgementLog
from tieback.pipeline.labelling.session import LEASE_SECONDS, Session


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def responses_file(tmp_path, count=6, num_responses=3):
    rows = [
        {
            "prompt_id": f"p{number}",
            "prompt": [{"role": "user", "content": f"Question {number}?"}],
            "responses": [f"answer {number}.{index}" for index in range(num_responses)],
        }
        for number in range(count)
    ]
    return write_jsonl(tmp_path / "responses.jsonl", rows)


def make_session(tmp_path, count=6, num_responses=3, **settings):
    items = read_responses(responses_file(tmp_path, count, num_responses))
    output = tmp_path / "preferences.jsonl"
    return Session(items, open_log(output), output, **settings)


def answer_for(view, key=None, **more):
    """Rank what is shown by `key` of the text (by the text itself if None), best first."""
    best_first = sorted(view["responses"], key=key)
    return {"ranks": [best_first.index(text) + 1 for text in view["responses"]], **more}


def judge_all(session, annotator, limit=100):
    view, seen = session.start(annotator), []
    while not view.get("finished") and len(seen) < limit:
        seen.append(view["item_id"])
        view = session.judge(annotator, view["item_id"], answer_for(view))
        assert "error" not in view
    return seen


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_ranking_gives_all_its_pairs_whatever_the_order_shown(tmp_path):
    session = make_session(tmp_path)
    assert len(judge_all(session, "ada")) == 6
    rows = read_jsonl(session.output)
    expected = [
        {
            "prompt_id": item.row["prompt_id"],
            "prompt": item.row["prompt"],
            "annotator": "ada",
            "chosen": [{"role": "assistant", "content": better}],
            "rejected": [{"role": "assistant", "content": worse}],
        }
        for item in session.items
        for better, worse in combinations(sorted(item.row["responses"]), 2)
    ]
    assert rows == expected
    assert len(load_rows(str(session.output), "preferences").dataset) == 18


def test_ties_and_flagged_items_give_no_pairs(tmp_path):
    session = make_session(tmp_path, count=3)
    view = session.start("ada")
    view = session.judge("ada", view["item_id"], {"ranks": [1, 2, 2]})
    assert len(read_jsonl(session.output)) == 2
    view = session.judge("ada", view["item_id"], {"ranks": [1, 1, 1]})
    view = session.judge("ada", view["item_id"], {"ranks": [1, 2, 3], "flag": "unsafe", "note": "hm"})
    assert view["finished"]
    assert len(read_jsonl(session.output)) == 2
    kept = list(session.log.judgements.values())
    assert [(j.flag, j.note, j.ranks is None) for j in kept] == [
        (None, "", False),
        (None, "", False),
        ("unsafe", "hm", True),
    ]


def test_what_is_shown_does_not_tell_who_wrote_it_and_every_place_is_as_likely(tmp_path):
    session = make_session(tmp_path, count=300)
    places = Counter()
    for item in session.items:
        order = item.shown_order("ada", 0)
        assert order == item.shown_order("ada", 0)
        places[tuple(order)] += 1
    assert len(places) == 6
    assert min(places.values()) > 25  # 50 expected, standard deviation 6.5
    rows = [{"prompt": "Why?", "sft": {"response": "a"}, "ppo": {"response": "b"}, "outcome": 1.0}]
    items = read_comparisons(write_jsonl(tmp_path / "samples.jsonl", rows))
    session = Session(items, JudgementLog(tmp_path / "log"), tmp_path / "c.jsonl", side_by_side=True)
    text = json.dumps(session.start("ada"))
    assert "sft" not in text
    assert "ppo" not in text
    assert "outcome" not in text


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"ranks": [1, 2]},
        {"ranks": [1, 2, 4]},
        {"ranks": [0, 1, 2]},
        {"ranks": [1, 2, None]},
        {"ranks": [1, 2, True]},
        {"ranks": "123"},
        {"ranks": [1, 2, 3], "flag": "boring"},
        {"ranks": [1, 2, 3], "ratings": {"beauty": [1, 1, 1]}},
        {"ranks": [1, 2, 3], "ratings": {"quality": [1, 6, 1]}},
        {"ranks": [1, 2, 3], "ratings": {"quality": [1]}},
        {"ranks": [1, 2, 3], "ratings": [1]},
        ["ranks"],
    ],
)
def test_a_bad_answer_is_refused_and_nothing_is_filed(tmp_path, answer):
    session = make_session(tmp_path)
    view = session.start("ada")
    before = session.log.path.read_bytes()
    assert set(session.judge("ada", view["item_id"], answer)) == {"error"}
    assert session.log.path.read_bytes() == before
    assert not session.output.exists()


@pytest.mark.parametrize("name", ["", "   ", "x" * 65, None, 3])
def test_an_annotator_has_a_name(tmp_path, name):
    assert "name" in make_session(tmp_path).start(name)["error"]


def test_undo_appends_and_brings_back_what_was_said(tmp_path):
    session = make_session(tmp_path)
    first = session.start("ada")
    answer = answer_for(first, ratings={"quality": [5, None, 1]}, note="really?")
    session.judge("ada", first["item_id"], answer)
    before = session.log.path.read_bytes()
    again = session.undo("ada")
    assert session.log.path.read_bytes().startswith(before)
    assert read_jsonl(session.output) == []
    assert again["item_id"] == first["item_id"]
    assert again["responses"] == first["responses"]
    assert again["earlier"] == {"ranks": answer["ranks"], "ratings": answer["ratings"], "note": "really?"}
    assert "nothing to undo" in session.undo("ada")["error"]
    session.judge("ada", first["item_id"], answer)
    assert len(read_jsonl(session.output)) == 3


def test_one_annotator_does_not_undo_anothers(tmp_path):
    session = make_session(tmp_path)
    judge_all(session, "ada", limit=1)
    assert "nothing to undo" in session.undo("bob")["error"]
    assert len(session.log.judgements) == 1


def test_reopening_goes_on_where_one_stopped(tmp_path):
    seen = judge_all(make_session(tmp_path), "ada", limit=2)
    session = make_session(tmp_path)
    view = session.start("ada")
    assert view["progress"] == {"done": 2, "total": 6}
    assert view["item_id"] not in seen
    assert len(seen + judge_all(session, "ada")) == 6


def test_annotators_share_the_work_and_the_overlap(tmp_path):
    session = make_session(tmp_path, count=200, overlap=0.25)
    shown = {"ada": [], "bob": []}
    views = {name: session.start(name) for name in shown}
    while not all(view.get("finished") for view in views.values()):
        for name, view in views.items():
            if not view.get("finished"):
                shown[name].append(view["item_id"])
                views[name] = session.judge(name, view["item_id"], answer_for(view))
    both = set(shown["ada"]) & set(shown["bob"])
    assert set(shown["ada"]) | set(shown["bob"]) == {item.item_id for item in session.items}
    assert both == {item.item_id for item in session.items if session._is_shared(item)}
    assert 30 <= len(both) <= 70  # 50 expected, standard deviation 6.1


def test_with_full_overlap_everybody_judges_everything(tmp_path):
    session = make_session(tmp_path, overlap=1.0)
    assert judge_all(session, "ada") == judge_all(session, "bob")
    assert len(read_jsonl(session.output)) == 2 * 6 * 3


def test_what_somebody_left_lying_is_offered_to_others_in_the_end(tmp_path):
    now = [time.time()]
    session = make_session(tmp_path, count=1, clock=lambda: now[0])
    session.start("ada")
    assert session.start("bob")["finished"]
    now[0] += LEASE_SECONDS + 1
    assert not session.start("bob").get("finished")


def test_a_skipped_item_is_offered_to_others_but_not_again(tmp_path):
    session = make_session(tmp_path, count=1)
    view = session.start("ada")
    assert session.judge("ada", view["item_id"], {"flag": "skip"})["finished"]
    assert session.start("ada")["finished"]
    assert session.start("bob")["item_id"] == view["item_id"]


def test_a_torn_line_costs_nothing_else(tmp_path, caplog):
    session = make_session(tmp_path)
    judge_all(session, "ada", limit=2)
    with session.log.path.open("ab") as file:
        file.write(b'{"event": "judged", "judgement_id": "x", "no')
    session = make_session(tmp_path)
    assert len(session.log.judgements) == 2
    judge_all(session, "ada", limit=1)
    session = make_session(tmp_path)
    assert len(session.log.judgements) == 3
    assert "is not whole" in caplog.text


JUDGE_FOR_EVER = """
import sys
from pathlib import Path
from test_label_session import Session, answer_for, open_log, read_responses

folder, annotator = Path(sys.argv[1]), sys.argv[2]
output = folder / "preferences.jsonl"
session = Session(read_responses(folder / "responses.jsonl"), open_log(output), output, overlap=0.3)
view = session.start(annotator)
while not view.get("finished"):
    done = view["item_id"]
    view = session.judge(annotator, done, answer_for(view))
    print(done, flush=True)
"""


def start_judging(tmp_path, annotator):
    command = [sys.executable, "-c", JUDGE_FOR_EVER, str(tmp_path), annotator]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )


@pytest.mark.slow
def test_two_servers_share_a_log_and_one_may_be_killed(tmp_path):
    responses_file(tmp_path, count=120)
    killed, other = start_judging(tmp_path, "ada"), start_judging(tmp_path, "bob")
    acknowledged = [killed.stdout.readline().strip() for _ in range(10)]
    killed.send_signal(signal.SIGKILL)
    acknowledged += killed.stdout.read().split()
    told = other.communicate(timeout=120)[0].split()
    assert other.returncode == 0
    session = make_session(tmp_path, count=120, overlap=0.3)
    by_ada = [j.item_id for j in session.log.judgements.values() if j.annotator == "ada"]
    by_bob = [j.item_id for j in session.log.judgements.values() if j.annotator == "bob"]
    # What the page was told of is there; at most the one in hand is there without the page having heard.
    assert by_ada[: len(acknowledged)] == acknowledged
    assert len(by_ada) <= len(acknowledged) + 1
    assert by_bob == told
    assert all(session._is_shared(session._by_id[item]) for item in set(by_ada) & set(by_bob))
    # The preference file is whole, and that of the log.
    assert len(read_jsonl(session.output)) == 3 * (len(by_ada) + len(by_bob))
    left = judge_all(session, "ada")
    assert {*by_ada, *by_bob, *left} == {item.item_id for item in session.items}


def test_judgements_belong_to_their_texts_whatever_the_file_and_its_order(tmp_path):
    session = make_session(tmp_path)
    judge_all(session, "ada", limit=2)
    rows = read_jsonl(tmp_path / "responses.jsonl")
    items = read_responses(write_jsonl(tmp_path / "other.jsonl", rows[::-1]))
    assert Session(items, open_log(session.output), session.output).start("ada")["progress"]["done"] == 2
    rows[0]["responses"][0] += " changed"
    items = read_responses(write_jsonl(tmp_path / "other.jsonl", rows))
    before = session.output.read_bytes()
    with pytest.raises(UsageError, match="1 judgements of responses that are not in this file"):
        Session(items, open_log(session.output), session.output)
    assert session.output.read_bytes() == before


def test_an_item_judged_again_has_one_judgement(tmp_path):
    session = make_session(tmp_path, count=1)
    view = session.start("ada")
    session.judge("ada", view["item_id"], {"ranks": [1, 2, 3]})
    session.judge("ada", view["item_id"], {"ranks": [3, 2, 1]})
    for log in (session.log, open_log(session.output)):
        (judgement,) = log.judgements.values()
        assert [judgement.ranks[index] for index in judgement.order] == [3, 2, 1]


def test_rows_with_nothing_to_compare_are_left_out_and_bad_ones_named(tmp_path):
    same = {"prompt": "Why?", "responses": ["a", "a"]}
    fine = {"prompt": "Why?", "responses": ["a", "b"]}
    assert len(read_responses(write_jsonl(tmp_path / "a.jsonl", [same, fine, fine]))) == 1
    with pytest.raises(DataError, match="nothing to compare"):
        read_responses(write_jsonl(tmp_path / "a.jsonl", [same]))
    with pytest.raises(DataError, match=r"a\.jsonl, line 2.*`responses`"):
        read_responses(write_jsonl(tmp_path / "a.jsonl", [fine, {"prompt": "Why?", "responses": "b"}]))
    with pytest.raises(DataError, match=r"a\.jsonl, line 1.*`ppo`"):
        read_comparisons(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Why?", "sft": {"response": "a"}}]))


def test_a_file_that_was_not_made_here_is_not_overwritten(tmp_path):
    output = write_jsonl(tmp_path / "preferences.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(UsageError, match=r"preferences\.jsonl exists"):
        open_log(output)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either --responses or --compare"),
        ({"responses": "a", "compare": "b"}, "either --responses or --compare"),
        ({"responses": "a", "overlap": 1.5}, "overlap"),
        ({"responses": "a", "host": "0.0.0.0"}, "set a --password"),
        ({"responses": "a", "host": "192.168.1.5"}, "set a --password"),
        ({"responses": "a", "host": "example.org"}, "set a --password"),
        ({"responses": "a", "output": "out.json"}, r"must end in \.jsonl"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        LabelArguments(**{"output": "out.jsonl", **settings})
    for host in ("127.0.0.1", "localhost", "::1"):
        LabelArguments(output="out.jsonl", responses="a", host=host)


def test_without_the_extra_the_command_says_what_to_install(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else real(name))
    with pytest.raises(UsageError, match=r"gradio must be installed: `pip install 'tieback\[label\]'`"):
        label.main()


def test_the_summary_is_printed(tmp_path, monkeypatch, capsys):
    session = make_session(tmp_path, overlap=1.0)
    judge_all(session, "ada")
    judge_all(session, "bob", limit=3)
    responses = str(tmp_path / "responses.jsonl")
    monkeypatch.setattr(
        sys, "argv", ["label", "--responses", responses, "--output", str(session.output), "--summary"]
    )
    label.main()
    printed = capsys.readouterr().out
    assert re.search(r"judgements/by/ada\W+6\b", printed)
    assert re.search(r"judgements/by/bob\W+3\b", printed)
    assert re.search(r"agreement/alpha\W+1\b", printed)
