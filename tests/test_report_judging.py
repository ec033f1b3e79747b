"""The report on judges of the training: what is drawn, and the sentence that follows from it."""

import re

import pytest

from tieback.pipeline.report.judging import Evaluation, evaluations, judged_html, verdict


def entry(step: int, kl: float, reward: float, judge: float) -> dict[str, float]:
    return {"step": step, "eval_kl/ref": kl, "eval_reward/mean": reward, "eval_judge/mean": judge}


EXPLOITED = [entry(5, 1.0, 0.2, 0.7), entry(10, 4.0, 0.6, 0.9), entry(15, 9.0, 1.1, 0.5)]


def test_evaluations_are_those_that_judges_took_part_in() -> None:
    history = [
        {"step": 5, "reward/mean": 3.0},
        *EXPLOITED,
        {"step": 20, "eval_reward/mean": 1.0, "eval_kl/ref": 1.0},
    ]
    assert evaluations(history) == [
        Evaluation(5, 1.0, 0.2, 0.7),
        Evaluation(10, 4.0, 0.6, 0.9),
        Evaluation(15, 9.0, 1.1, 0.5),
    ]


def test_a_judge_that_falls_while_the_reward_rises_is_named_with_what_to_do() -> None:
    text = verdict(evaluations(EXPLOITED))
    assert "highest, 0.90 at iteration 10 (4.0 nats)" in text
    assert "iteration 15, it was 0.50" in text
    assert "rose from 0.60 to 1.10" in text
    assert "load_best_model_at_end" in text


@pytest.mark.parametrize(
    ("last", "says"),
    [
        (entry(15, 9.0, 1.1, 0.95), "highest at the last evaluation: 0.95 at iteration 15 (9.0 nats)."),
        (entry(15, 9.0, 0.5, 0.5), "it was 0.50."),
    ],
)
def test_nothing_is_said_to_be_exploited_where_both_rise_or_both_fall(
    last: dict[str, float], says: str
) -> None:
    text = verdict(evaluations([*EXPLOITED[:2], last]))
    assert text.endswith(says)
    assert "exploits" not in text


def test_both_are_drawn_against_the_root_of_the_kl() -> None:
    page = judged_html(EXPLOITED)
    assert page.count("<svg") == 2
    assert page.count("√nats") >= 2
    # Ticks of the axis reach 3, not 9.
    ticks = [float(tick) for tick in re.findall(r">([0-9.]+)</text>", page)]
    assert max(ticks) <= 3


def test_without_judges_or_with_a_single_evaluation_nothing_is_drawn() -> None:
    assert judged_html([{"step": 1, "eval_reward/mean": 1.0, "eval_kl/ref": 0.1}] * 3) == ""
    assert judged_html(EXPLOITED[:1]) == ""
