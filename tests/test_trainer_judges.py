"""Judges of an evaluation: what they are given, that training does not see them, and the training that stops by them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from safetensors.torch import load_file

from tieback.cli.errors import UsageError
from tieback.pipeline.trainer import PPOTrainer

EVALUATES = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


def length_judge(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def judging(folder: Path, judge_funcs: Any, **settings: Any) -> PPOTrainer:
    given = {"eval_dataset": toy.prompts(5), "max_steps": 2, **settings}
    return toy.ppo_trainer(folder, judge_funcs=judge_funcs, **given)


def test_judges_score_what_evaluation_samples_and_nothing_else(tmp_path: Path) -> None:
    seen: list[int] = []

    def longest(completion_ids: list[list[int]], target: list[str], **_: Any) -> list[float | None]:
        seen.append(len(completion_ids))
        assert len(target) == len(completion_ids)
        return [None if len(ids) < 3 else 10.0 for ids in completion_ids]

    trainer = judging(tmp_path, [length_judge, longest], **EVALUATES)
    trainer.train()
    assert seen == [5, 5]
    for entry in trainer.state.log_history:
        if "policy/loss" in entry:
            assert not any("judge" in name for name in entry)
    entries = [entry for entry in trainer.state.log_history if "eval_judge/mean" in entry]
    assert len(entries) == 2
    for entry in entries:
        assert entry["eval_judge/length_judge"] == entry["eval_completions/mean_length"]
        assert entry["eval_judge/longest"] == 10  # the mean over those that it judges
        assert entry["eval_judge/mean"] > entry["eval_judge/length_judge"]


def test_what_is_learnt_does_not_depend_on_them(tmp_path: Path) -> None:
    results = []
    for judge, settings in ((length_judge, EVALUATES), (None, {})):
        trainer = judging(tmp_path / str(len(results)), judge, **settings)
        trainer.train()
        results.append(toy.weights(trainer.model))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_model_judges_as_it_rewards(tmp_path: Path) -> None:
    tok = toy.tokenizer()
    model = toy.reward_model(tok)
    model.save_pretrained(tmp_path / "judge")
    tok.save_pretrained(tmp_path / "judge")
    trainer = judging(
        tmp_path, str(tmp_path / "judge"), reward_funcs=toy.reward_model(tok), reward_processing_classes=tok
    )
    metrics = trainer.evaluate()
    assert metrics["eval_judge/judge"] == metrics["eval_judge/mean"]
    assert metrics["eval_judge/mean"] == pytest.approx(metrics["eval_reward/mean"], abs=1e-6)
    assert metrics["eval_judge/mean"] != 0


def scripted(values: list[float]) -> Callable[..., list[float]]:
    """A judge whose n-th call gives the n-th of `values` to everything."""
    given = iter(values)

    def judge(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [next(given)] * len(completion_ids)

    return judge


STOPS = {
    **EVALUATES, "load_best_model_at_end": True, "metric_for_best_model": "judge/mean", "early_stopping_patience": 2,
    "max_steps": 6, "save_total_limit": 6,
}  # fmt: skip


def test_training_stops_when_the_judge_has_fallen_and_the_best_policy_is_kept(tmp_path: Path) -> None:
    trainer = judging(tmp_path, scripted([1.0, 3.0, 2.9, 2.0, 5.0]), **STOPS)
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.state.best_global_step == 2
    best = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    last = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    policy = toy.weights(trainer.model.policy)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(policy[name], best[name])
    assert not torch.equal(policy[name], last[name])


def test_a_judge_that_recovers_in_time_stops_nothing(tmp_path: Path) -> None:
    trainer = judging(tmp_path, scripted([1.0, 3.0, 2.9, 4.0, 3.0, 5.0]), **STOPS)
    trainer.train()
    assert trainer.state.global_step == 6


def test_a_resumed_run_remembers_how_long_the_judge_has_been_falling(tmp_path: Path) -> None:
    first = judging(tmp_path, scripted([1.0, 3.0, 2.9]), **STOPS | {"max_steps": 3})
    first.train()
    second = judging(tmp_path, scripted([2.8, 5.0]), **STOPS)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert second.state.global_step == 4
    assert second.state.best_global_step == 2


def test_a_judge_that_cannot_be_called_and_a_figure_that_is_not_there_are_refused(tmp_path: Path) -> None:
    def needs_answer(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
        return [0.0] * len(completions)

    with pytest.raises(UsageError, match="judge_funcs: 7 is of type int"):
        judging(tmp_path, 7)
    with pytest.raises(UsageError, match="judge_funcs is empty"):
        judging(tmp_path, [])
    with pytest.raises(UsageError, match="The reward function `needs_answer` cannot judge eval_dataset"):
        judging(tmp_path, needs_answer)
    with pytest.raises(
        UsageError, match=r"evaluation gives reward/mean, .*, judge/mean, judge/length_judge\. Name"
    ):
        judging(tmp_path, length_judge, **EVALUATES, metric_for_best_model="judge/other")
    with pytest.raises(
        UsageError,
        match="early_stopping_patience, save_strategy=best and schedules that follow a metric need",
    ):
        judging(tmp_path, length_judge, early_stopping_patience=2)
    with pytest.raises(ValueError, match="early_stopping_patience must be above 0"):
        judging(tmp_path, length_judge, **EVALUATES, early_stopping_patience=0)
