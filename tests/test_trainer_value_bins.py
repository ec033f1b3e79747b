"""A critic over bins, of every kind: where it starts, what it saves, and what starts from it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from peft import LoraConfig

from tieback.cli.errors import UsageError
from tieback.pipeline.trainer import PPOTrainer
from tieback.reward_model.adapter import read_scalar_adapter
from tieback.reward_model.head import load_reward_model

BINNED: dict[str, Any] = {"value_bins": 41, "value_range": 20.0, "value_clip_range": None}
PLAIN: dict[str, Any] = {"value_clip_range": None}
SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}


def run(folder: Path, kind: str, start: Any = None, **settings: Any) -> PPOTrainer:
    """A trainer with a critic of the kind, from `start`, or else from a reward model with a bias (of a shared one, new)."""
    tok = toy.tokenizer()
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if kind == "adapter" else None
    if start is None and kind == "separate":
        start = toy.reward_model(tok)
        start.config.reward_bias = 0.3
    elif start is None and kind == "adapter":
        start = toy.reward_adapter()
    return toy.ppo_trainer(folder, critic=kind, value_model=start, peft_config=lora, **settings)


def values(trainer: PPOTrainer) -> torch.Tensor:
    torch.manual_seed(5)
    scored = trainer.score(trainer.generate([trainer.train_dataset[i] for i in range(8)]))
    batch = trainer.to_batch(scored)
    return batch.old_values[batch.mask]


@pytest.mark.parametrize("kind", ["separate", "adapter", "shared"])
def test_it_starts_with_the_values_of_a_critic_of_one_number(tmp_path: Path, kind: str) -> None:
    plain = values(run(tmp_path / "plain", kind, **PLAIN))
    binned = values(run(tmp_path / "binned", kind, **BINNED))
    assert plain.abs().max() < 10  # half of the range
    torch.testing.assert_close(binned, plain, rtol=0, atol=2e-4)
    if kind != "shared":
        assert plain.std() > 1e-3  # a new head gives 0 everywhere


@pytest.mark.parametrize("kind", ["separate", "adapter", "shared"])
def test_it_learns_and_goes_on_from_a_checkpoint_bit_for_bit(tmp_path: Path, kind: str) -> None:
    straight = run(tmp_path / "straight", kind, max_steps=3, **BINNED, **SAVED)
    before = straight.model.critic.score.weight.detach().clone()
    straight.train()
    assert not torch.allclose(straight.model.critic.score.weight, before, atol=1e-3)
    resumed = run(tmp_path / "resumed", kind, max_steps=3, **BINNED, **SAVED)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    torch.testing.assert_close(toy.weights(resumed.model), toy.weights(straight.model), rtol=0, atol=0)
    (last,) = toy.iteration_logs(resumed)[-1:]
    assert (
        last["value/outside_range_fraction"]
        == toy.iteration_logs(straight)[-1]["value/outside_range_fraction"]
    )


def test_the_share_of_returns_beyond_the_bins_is_logged(tmp_path: Path) -> None:
    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [90.0 if row % 4 == 0 else 0.0 for row in range(len(completion_ids))]

    trainer = toy.ppo_trainer(
        tmp_path, reward, max_steps=1, kl_coef=0.0, missing_eos_penalty=0.0, gae_lambda=1.0, **BINNED
    )
    trainer.train()
    lengths = [len(ids) for ids in trainer._last_rollout.rollout.completion_ids]
    # With λ 1 and no KL the return of each token is the reward of its completion.
    expected = sum(lengths[::4]) / sum(lengths)
    assert toy.iteration_logs(trainer)[0]["value/outside_range_fraction"] == pytest.approx(expected)
    assert not any("outside" in name for name in toy.iteration_logs(short(tmp_path / "plain"))[0])


def short(folder: Path) -> PPOTrainer:
    trainer = toy.ppo_trainer(folder, max_steps=1)
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", ["separate", "adapter"])
def test_a_critic_over_bins_starts_another_of_the_same_bins_and_nothing_else(
    tmp_path: Path, kind: str
) -> None:
    first = run(tmp_path / "first", kind, **BINNED)
    first.train()
    first.save_model(str(tmp_path / "saved"))
    folder = tmp_path / "saved" / "value_model"
    config = json.loads((folder / "config.json").read_text())
    assert (len(config["id2label"]), config["value_range"]) == (41, 20.0)

    start: Any = str(folder) if kind == "separate" else read_scalar_adapter(folder, as_critic=True)

    def again(**settings: Any) -> PPOTrainer:
        return run(tmp_path / "again", kind, start, **settings)

    second = again(**BINNED)
    names = [name for name in toy.weights(first.model) if "critic" in name]
    assert names
    for name in names:
        assert torch.equal(toy.weights(second.model)[name], toy.weights(first.model)[name])
    with pytest.raises(
        UsageError, match=r"value_bins 41 and value_range 20.0, and this run asks for value_bins null"
    ):
        again(**PLAIN)
    with pytest.raises(
        UsageError, match=r"asks for value_bins 41 and value_range 5.0. Set both as they were"
    ):
        again(**(BINNED | {"value_range": 5.0}))
    with pytest.raises(UsageError, match=r"is a critic with value_bins=41, not a reward model"):
        (load_reward_model if kind == "separate" else read_scalar_adapter)(folder)
