"""The page made from a run's files, anew with people's comparisons, and the page of several runs."""

import json
import re
import sys

import pytest
import torch
from accelerate import Accelerator
from playwright.sync_api import expect

from tieback.cli.errors import UsageError
from tieback.pipeline.label import open_log
from tieback.pipeline.labelling.items import read_comparisons
from tieback.pipeline.labelling.session import Session
from tieback.pipeline.report import __main__ as command
from tieback.pipeline.report.comparison import evaluation_folder, render_comparison
from tieback.pipeline.report.curves import read_events
from tieback.pipeline.report.gather import gather, write_facts, write_report

METRICS = {
    "num_prompts": 40,
    "win_rate/ppo_vs_sft": 0.8,
    "win_rate/ci95_low": 0.7,
    "win_rate/ci95_high": 0.9,
    "kl/ppo_vs_sft": 4.5,
    "gold_score/sft": 0.5,
    "gold_score/ppo": 0.75,
}


def make_run(folder, name="run", gold=0.75, round=1, **settings):
    """Files of a run with 40 prompts, of which PPO wins those with an even number by the gold judge."""
    run = folder / name
    evaluation = run / "evaluate" if round == 1 else run / f"round{round}" / "evaluate"
    evaluation.mkdir(parents=True)
    pairs = [
        {
            "prompt": [{"role": "user", "content": f"Question {number}?"}],
            "sft": {
                "response": f"sft answers {number}",
                "gold_score": 0.5,
                "num_tokens": 3,
                "truncated": False,
            },
            "ppo": {
                "response": f"ppo answers {number}",
                "gold_score": 0.5 + (0.01 + number / 100 if number % 2 == 0 else -0.01 - number / 100),
                "num_tokens": 3 + number,
                "truncated": False,
            },
            "outcome": float(number % 2 == 0),
        }
        for number in range(40)
    ]
    (evaluation / "samples.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (evaluation / "metrics.json").write_text(json.dumps({**METRICS, "gold_score/ppo": gold}))
    (run / "ppo").mkdir(exist_ok=True)
    (run / "ppo" / "settings.json").write_text(json.dumps({"kl_coef": 0.1, "run_dir": str(run), **settings}))
    history = [{"step": step, "reward/mean": step * gold, "kl/ref": step / 10} for step in range(1, 6)]
    (run / "ppo" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    facts = {
        "judge": "gold_score",
        "judge_name": "the gold judge",
        "prompts_name": "helpdesk",
        "stages": {stage: str(run / stage) for stage in ("sft", "collect", "reward", "ppo")},
        "rounds": [str(run / "evaluate")] if round == 2 else [],
        "compare": str(run / "compare" / "preferences.judgements.jsonl"),
        "pong": str(folder / "pong"),
        "frontier": [],
        "versions": {"torch": "2"},
        "num_examples": 6,
        "num_resamples": 2000,
        "seed": 0,
    }
    write_facts(evaluation, facts)
    return run


def judge(run, annotator, prefers_ppo, limit):
    """Compare as an annotator who knows by a rule: `prefers_ppo(number)` is True, False or None for a tie."""
    items = read_comparisons(run / "evaluate" / "samples.jsonl")
    output = run / "compare" / "preferences.jsonl"
    session = Session(items, open_log(output), output, overlap=1.0, side_by_side=True)
    view = session.start(annotator)
    for _ in range(limit):
        number = int(re.search(r"\d+", view["prompt"][0]["content"])[0])
        choice = prefers_ppo(number)
        ranks = [1 if choice is None or text.startswith("ppo") == choice else 2 for text in view["responses"]]
        view = session.judge(annotator, view["item_id"], {"ranks": ranks})
        assert "error" not in view


def test_peoples_comparisons_come_into_the_page_and_are_counted_right(tmp_path):
    run = make_run(tmp_path)
    assert gather(run / "evaluate").human == {}
    # 30 prompts: PPO on 20 of them (all even ones and five odd), ties on 4, SFT on 6.
    choices = dict.fromkeys(range(0, 30, 2), True) | dict.fromkeys((1, 3, 5, 7, 9), True)
    choices |= dict.fromkeys((11, 13, 15, 17), None) | dict.fromkeys((19, 21, 23, 25, 27, 29), False)
    judge(run, "ada", choices.__getitem__, limit=30)
    figures = gather(run / "evaluate").human
    assert figures["human/num_prompts"] == figures["human/num_judgements"] == 30
    assert figures["human/win_rate"] == pytest.approx((20 + 2) / 30)
    assert figures["human/agreement_with_judge"] == pytest.approx((15 + 6) / 26)
    assert figures["human/ci95_low"] < figures["human/win_rate"] < figures["human/ci95_high"]
    # A second person says the opposite of the first ten, where PPO had won: these count a half each.
    judge(run, "bob", lambda number: None if choices[number] is None else not choices[number], limit=10)
    figures = gather(run / "evaluate").human
    assert figures["human/num_judgements"] == 40
    assert figures["human/win_rate"] == pytest.approx((10 / 2 + 10 + 2) / 30)
    page = write_report(run / "evaluate").read_text(encoding="utf-8")
    assert "By people’s judgement" in page


@pytest.mark.parametrize(
    ("collect", "reward", "who"),
    [
        ({"annotator": "simulated"}, {}, "the simulated annotator"),
        ({"annotator": "none"}, {}, "people"),
        ({"annotator": "none"}, {"dataset_name": "pairs.jsonl"}, "the ranking in the data"),
        ({}, {}, "the ranking"),
    ],
)
def test_the_page_says_who_ranked(tmp_path, collect, reward, who):
    run = make_run(tmp_path)
    for stage, settings in (("collect", collect), ("reward", reward)):
        (run / stage).mkdir()
        (run / stage / "settings.json").write_text(json.dumps(settings))
    assert gather(run / "evaluate").ranked_by == who


def test_judgements_of_other_texts_do_not_count(tmp_path):
    run = make_run(tmp_path)
    judge(run, "ada", lambda number: True, limit=5)
    samples = run / "evaluate" / "samples.jsonl"
    samples.write_text(samples.read_text().replace("ppo answers 0", "ppo says 0"))
    assert gather(run / "evaluate").human["human/num_prompts"] == 4


def test_a_run_may_be_moved(tmp_path):
    run = make_run(tmp_path)
    before = gather(run / "evaluate")
    run.rename(tmp_path / "moved")
    after = gather(tmp_path / "moved" / "evaluate")
    assert after.histories == before.histories
    assert after.histories["ppo"]


def test_rounds_are_gathered_and_the_last_one_is_the_runs(tmp_path):
    make_run(tmp_path, gold=0.7)
    run = make_run(tmp_path, gold=0.9, round=2)
    assert evaluation_folder(run) == run / "round2" / "evaluate"
    assert [metrics["gold_score/ppo"] for metrics in gather(evaluation_folder(run)).rounds] == [0.7, 0.9]


def test_an_unfinished_evaluation_is_named(tmp_path):
    with pytest.raises(UsageError, match="make evaluate"):
        evaluation_folder(tmp_path)
    run = make_run(tmp_path)
    (run / "evaluate" / "report.json").unlink()
    with pytest.raises(UsageError, match=r"report\.json missing"):
        gather(run / "evaluate")


def test_runs_are_compared_on_one_page(tmp_path, monkeypatch, capsys):
    runs = [make_run(tmp_path, f"<b>run{n}</b>", gold=0.5 + n / 8, kl_coef=n / 10, seed=0) for n in range(3)]
    monkeypatch.setattr(
        sys, "argv", ["report", *map(str, runs), "--output", str(tmp_path / "out" / "c.html")]
    )
    command.main()
    assert str(tmp_path / "out" / "c.html") in capsys.readouterr().out
    page = (tmp_path / "out" / "c.html").read_text(encoding="utf-8")
    assert "<b>run" not in page
    for value in ("0.500", "0.625", "0.750"):
        assert value in page
    assert page.count("<svg") == 2
    assert all(f"var(--series-{number})" in page for number in (1, 2, 3))
    differences = page[page.index("Where the recipes differ") :]
    assert "ppo: kl_coef" in differences
    assert "seed" not in differences
    assert "run_dir" not in differences
    with pytest.raises(UsageError, match="At most 6"):
        render_comparison(runs * 3)


def test_the_command_makes_one_runs_page_anew(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report", str(run)])
    command.main()
    assert str(run / "evaluate" / "report.html") in capsys.readouterr().out
    assert (run / "evaluate" / "report.html").is_file()


def test_scalars_are_read_from_what_accelerates_tracker_wrote(tmp_path):
    assert read_events(tmp_path) == []
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=str(tmp_path / "pong"))
    accelerator.init_trackers("logs")
    for step in (2048, 4096):
        accelerator.log({"policy/entropy": torch.tensor(step / 4096), "return/mean_20": -20.5}, step)
    accelerator.end_training()
    assert read_events(tmp_path / "pong") == [
        {"step": 2048, "policy/entropy": 0.5, "return/mean_20": -20.5},
        {"step": 4096, "policy/entropy": 1.0, "return/mean_20": -20.5},
    ]


def test_examples_are_sorted_in_the_browser(browser, tmp_path):
    path = write_report(make_run(tmp_path) / "evaluate")
    page = browser.new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())

    def prompts():
        return [
            int(re.search(r"\d+", text)[0])
            for text in page.locator(".pair:visible .prompt").all_inner_texts()
        ]

    drawn = prompts()
    assert len(drawn) == 6
    page.get_by_role("button", name="PPO won by most").click()
    assert prompts() == [38, 36, 34, 32, 30, 28]
    page.get_by_role("button", name="PPO lost by most").click()
    assert prompts() == [39, 37, 35, 33, 31, 29]
    page.get_by_role("button", name="PPO’s longest").click()
    assert prompts() == [39, 38, 37, 36, 35, 34]
    page.get_by_role("button", name="drawn at random").click()
    assert prompts() == drawn
    assert asked == [path.as_uri()]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone(browser, tmp_path, scheme):
    run = make_run(tmp_path)
    pages = [write_report(run / "evaluate"), tmp_path / "comparison.html"]
    pages[1].write_text(render_comparison([run, run]), encoding="utf-8")
    for path in pages:
        page = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme=scheme)
        page.goto(path.as_uri())
        expect(page.locator("h1")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 3 * 64) == (scheme == "dark")
