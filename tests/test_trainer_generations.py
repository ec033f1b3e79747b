"""Several completions of a prompt: which rows an iteration takes, and what is logged of them."""

import statistics
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from tieback.cli.errors import UsageError
from tieback.pipeline.trainer import PPOConfig


def test_each_prompt_is_completed_several_times_and_once_an_epoch(tmp_path: Path) -> None:
    seen: list[tuple[list[str], list[list[int]], list[float]]] = []

    def reward(
        prompts: list[Any], completion_ids: list[list[int]], target: list[str], **_: Any
    ) -> list[float]:
        scores = toy.id_reward(completion_ids)
        words = [word + prompt[-1]["content"] for word, prompt in zip(target, prompts, strict=True)]
        seen.append((words, completion_ids, scores))
        return scores

    trainer = toy.ppo_trainer(tmp_path, reward, num_generations=4, num_train_epochs=1, max_steps=-1)
    trainer.train()
    logs = toy.iteration_logs(trainer)
    # 16 prompts, two of them in an iteration of 8 completions.
    assert trainer.state.global_step == len(logs) == 8
    calls = seen[-8:]
    runs = [[(word, len(list(same))) for word, same in groupby(words)] for words, _, _ in calls]
    assert all(len(run) == 2 and {count for _, count in run} == {4} for run in runs)
    assert len({word for run in runs for word, _ in run}) == 16
    for (_, completion_ids, scores), log in zip(calls, logs, strict=True):
        assert len({tuple(ids) for ids in completion_ids[:4]}) > 1
        spread = statistics.fmean([statistics.pstdev(scores[:4]), statistics.pstdev(scores[4:])])
        assert log["reward/std_within_prompt"] == pytest.approx(spread, rel=1e-5)


@pytest.mark.slow
def test_a_run_with_several_completions_a_prompt_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    ends = []
    for folder, steps in (("whole", 6), ("parts", 3), ("parts", 6)):
        settings = {"num_generations": 2, "lr_scheduler_type": "constant", "max_steps": steps}
        trainer = toy.ppo_trainer(tmp_path / folder, save_strategy="steps", save_steps=3, **settings)
        trainer.train(resume_from_checkpoint=None if steps == 3 or folder == "whole" else True)
        ends.append(toy.weights(trainer.accelerator.unwrap_model(trainer.model)))
    whole, _, resumed = ends
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_settings_that_do_not_divide_and_too_few_prompts_are_refused_with_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"per_device_train_batch_size=8 completions .* num_generations=3"):
        PPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=8, num_generations=3, use_cpu=True)
    with pytest.raises(ValueError, match="num_generations must be above 0 and finite, got 0"):
        PPOConfig(output_dir=str(tmp_path), num_generations=0, use_cpu=True)
    trainer = toy.ppo_trainer(tmp_path, train_dataset=toy.prompts(3), num_generations=2)
    message = r"3 prompts, but one iteration takes 4 \(per_device_train_batch_size=8 / num_generations=2 x 1"
    with pytest.raises(UsageError, match=message):
        trainer.train()
