"""evaluate(): means over all prompts, in every split among processes, without a trace in training."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy

from tieback.pipeline.rollout.responses import equal_share
from tieback.pipeline.trainer.random_state import kept_random_state


def length_reward(prompts: list[Any], **_: Any) -> list[float]:
    return [float(len(prompt[0]["content"])) for prompt in prompts]


def test_metrics_are_means_over_all_evaluation_prompts(tmp_path: Path) -> None:
    completions: list[list[int]] = []

    def reward(prompts: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        completions.extend(completion_ids)
        return length_reward(prompts)

    dataset = toy.prompts(13)
    trainer = toy.ppo_trainer(tmp_path, reward, eval_dataset=dataset, missing_eos_penalty=0.5)
    metrics = trainer.evaluate()
    assert len(completions) == 13
    expected = sum(length_reward(dataset["prompt"])) / 13
    truncated = sum(ids[-1] not in trainer.sampler.end_ids for ids in completions) / 13
    assert 0 < truncated < 1
    assert metrics["eval_reward/reward"] == pytest.approx(expected)
    assert metrics["eval_reward/mean"] == pytest.approx(expected)
    assert metrics["eval_reward/normalized_mean"] == pytest.approx(expected - 0.5 * truncated)
    assert metrics["eval_completions/mean_length"] == pytest.approx(sum(map(len, completions)) / 13)
    assert metrics["eval_completions/truncated_fraction"] == pytest.approx(truncated)
    assert metrics["eval_kl/ref"] == 0.0
    assert trainer.state.log_history[-1]["eval_reward/mean"] == metrics["eval_reward/mean"]


def test_the_prefix_and_the_data_set_can_be_chosen(tmp_path: Path) -> None:
    trainer = toy.ppo_trainer(tmp_path, length_reward, missing_eos_penalty=0.0)
    metrics = trainer.evaluate(toy.prompts(3), metric_key_prefix="test")
    assert metrics["test_reward/mean"] == pytest.approx(sum(length_reward(toy.prompts(3)["prompt"])) / 3)


@pytest.mark.parametrize("processes", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("count", [1, 2, 4, 7, 13])
def test_processes_share_the_prompts_evenly_and_each_counts_once(processes: int, count: int) -> None:
    shares = [equal_share(count, rank, processes) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    together = [row for share in shares for row in share]
    assert together[:count] == list(range(count))
    assert set(together) == set(range(count))


def test_evaluation_leaves_training_as_it_would_have_been(tmp_path: Path) -> None:
    results = []
    for settings in ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}):
        trainer = toy.ppo_trainer(
            tmp_path,
            eval_dataset=toy.prompts(7),
            normalize_rewards=True,
            kl_target=0.5,
            max_steps=3,
            **settings,
        )
        trainer.train()
        results.append(
            {
                "weights": toy.weights(trainer.model),
                "moments": trainer.reward_moments.state_dict(),
                "kl": trainer.kl_controller.state_dict(),
                "torch": torch.get_rng_state(),
                "numpy": torch.tensor(np.random.get_state()[1].astype(np.int64)),
                "python": list(random.getstate()[1]),
            }
        )
        evaluations = [entry for entry in trainer.state.log_history if "eval_reward/mean" in entry]
    assert len(evaluations) == 4
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_reward_functions_that_draw_numbers_leave_no_trace_either(tmp_path: Path) -> None:
    def drawing(completions: list[Any], **_: Any) -> list[float]:
        return [random.random() + float(np.random.rand()) for _ in completions]

    trainer = toy.ppo_trainer(tmp_path, drawing, eval_dataset=toy.prompts(7))
    before = random.getstate(), np.random.get_state()[1].tolist()
    trainer.evaluate()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_the_random_state_of_any_accelerator_is_kept(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device, states = torch.device(kind), {kind: torch.tensor([1])}
    module = getattr(torch, kind)
    monkeypatch.setattr(module, "get_rng_state", lambda device: states[str(device)])
    monkeypatch.setattr(module, "set_rng_state", lambda state, device: states.update({str(device): state}))
    before = torch.get_rng_state()
    with kept_random_state(device):
        states[kind] = torch.tensor([2])
        torch.rand(3)
    assert states[kind].item() == 1
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_is_the_same_each_time(tmp_path: Path) -> None:
    trainer = toy.ppo_trainer(tmp_path, eval_dataset=toy.prompts(7))
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first == second


def test_under_autocast_policy_and_reference_are_scored_alike_also_before_training(tmp_path: Path) -> None:
    trainer = toy.ppo_trainer(tmp_path, eval_dataset=toy.prompts(7), bf16=True)
    assert trainer.evaluate()["eval_kl/ref"] == 0.0
