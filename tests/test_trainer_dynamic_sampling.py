"""Dynamic sampling: which prompts an iteration learns from, that nothing is mixed up on the way, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from tieback.pipeline.trainer import PPOConfig, PPOTrainer
from tieback.pipeline.trainer.dynamic_sampling import join, select

SETTINGS: dict[str, Any] = {"num_generations": 2, "per_device_train_batch_size": 8}


def half_hopeless(prompts: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Completions of prompts of one or two words are all scored 0.5."""
    hopeless = [len(prompt[-1]["content"].split()) <= 2 for prompt in prompts]
    scores = toy.id_reward(completion_ids)
    return [0.5 if no else score for no, score in zip(hopeless, scores, strict=True)]


def rollouts_of(trainer: PPOTrainer) -> list[Any]:
    """What each iteration learns from (filled in as it trains)."""
    seen: list[Any] = []
    to_batch = trainer.to_batch

    def watched(scored: Any) -> Any:
        seen.append(scored)
        return to_batch(scored)

    trainer.to_batch = watched  # type: ignore[method-assign]
    return seen


def test_an_iteration_learns_from_prompts_whose_completions_are_scored_unlike(tmp_path: Path) -> None:
    trainer = toy.ppo_trainer(
        tmp_path, half_hopeless, dynamic_sampling_batches=20, max_steps=4, normalize_rewards=True, **SETTINGS
    )
    seen = rollouts_of(trainer)
    trainer.train()
    logs = toy.iteration_logs(trainer)
    assert sum(log["rollout/alike_fraction"] for log in logs) > 0.5
    for scored, log in zip(seen, logs, strict=True):
        by_prompt = scored.raw_scores.view(4, 2)
        assert (by_prompt[:, 0] != by_prompt[:, 1]).all()
        assert log["rollout/batches"] > 1 or log["rollout/alike_fraction"] == 0
        rollout = scored.rollout
        # Each completion is still beside its prompt, its columns and its scores.
        assert rollout.prompts[0::2] == rollout.prompts[1::2]
        fresh = half_hopeless(rollout.prompts, rollout.completion_ids)
        assert scored.raw_scores.tolist() == pytest.approx(fresh, abs=1e-6)
        words = {str(row["prompt"]): row["target"] for row in toy.prompts()}
        assert rollout.columns["target"] == [words[str(prompt)] for prompt in rollout.prompts]
        assert scored.token_scores.shape[1] == max(map(len, rollout.completion_ids))
        for row, ids in enumerate(rollout.completion_ids):
            assert not scored.token_scores[row, len(ids) :].any()
        lengths = [len(ids) for ids in rollout.completion_ids]
        assert log["completions/mean_length"] == pytest.approx(sum(lengths) / 8)


def test_where_all_are_alike_the_first_batch_is_learnt_from_as_it_is(tmp_path: Path) -> None:
    def constant(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [0.5] * len(completion_ids)

    trainer = toy.ppo_trainer(tmp_path, constant, dynamic_sampling_batches=3, max_steps=1, **SETTINGS)
    seen = rollouts_of(trainer)
    generated: list[Any] = []
    generate = trainer.generate
    trainer.generate = lambda rows: generated.append(generate(rows)) or generated[-1]  # type: ignore[method-assign]
    trainer.train()
    (log,), (scored,) = toy.iteration_logs(trainer), seen
    assert (log["rollout/alike_fraction"], log["rollout/batches"]) == (1, 3)
    assert len(generated) == 3
    assert scored.rollout.completion_ids == generated[0].completion_ids


def test_rows_that_are_taken_apart_and_joined_are_what_they_were(tmp_path: Path) -> None:
    trainer = toy.ppo_trainer(
        tmp_path,
        importance_sampling="token",
        rollout_func=toy.two_turns,
        max_completion_length=14,
        truncation="mask",
    )
    scored = trainer.score(trainer.generate(list(toy.prompts(8))))
    nothing = select(scored, [])
    again = join([select(scored, [2, 0]), nothing, select(scored, [1, 3, 4, 5, 6, 7])])
    order = [1, 2, 0, 3, 4, 5, 6, 7]
    back = select(again, order)
    assert back.rollout == scored.rollout
    torch.testing.assert_close(back.token_scores, scored.token_scores, rtol=0, atol=0)
    torch.testing.assert_close(back.rewards, scored.rewards, rtol=0, atol=0)


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    def trainer(folder: str) -> PPOTrainer:
        settings = {"dynamic_sampling_batches": 4, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        return toy.ppo_trainer(tmp_path / folder, half_hopeless, **settings, **SETTINGS)

    whole, resumed = trainer("whole"), trainer("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, weight in toy.weights(whole.model).items():
        assert torch.equal(weight, resumed.model.get_parameter(name)), name


def test_one_completion_of_each_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scored alike, but there is one of each: set num_generations"):
        PPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", dynamic_sampling_batches=2)
