"""What the critic learns by itself: a warm-up that ends when it no longer becomes better, and further epochs."""

import json
import math
from pathlib import Path

import pytest
import torch
import toy

from tieback.pipeline.trainer.critic_warmup import CriticWarmup
from tieback.ppo_core import explained_variance


def test_the_warm_up_ends_when_the_explained_variance_has_not_risen() -> None:
    warmup = CriticWarmup(iterations=10, patience=2)
    active = []
    for iteration, value in enumerate([-1.0, 0.2, 0.5, 0.505, 0.49, 0.9, 0.95]):
        active.append(warmup.active(iteration))
        warmup.update(value)
    # 0.505 is no rise worth the name, and so the second one without is 0.49; it does not begin again.
    assert active == [True] * 5 + [False] * 2


@pytest.mark.parametrize("patience", [None, 5])
def test_it_never_lasts_longer_than_it_may(patience: int | None) -> None:
    warmup = CriticWarmup(iterations=3, patience=patience)
    active = []
    for iteration in range(6):
        active.append(warmup.active(iteration))
        warmup.update(float(iteration))
    assert active == [True] * 3 + [False] * 3


def test_returns_that_do_not_vary_count_as_no_rise_and_the_state_is_json() -> None:
    warmup = CriticWarmup(iterations=9, patience=1)
    copy = CriticWarmup(iterations=9, patience=1)
    copy.load_state_dict(json.loads(json.dumps(warmup.state_dict())))
    assert copy.state_dict() == warmup.state_dict()
    assert copy.active(0)
    copy.update(math.nan)
    assert not copy.active(1)
    warmup.load_state_dict(json.loads(json.dumps(copy.state_dict())))
    assert not warmup.active(1)


def policy_of(folder: Path, step: int) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(folder / f"checkpoint-{step}" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]


def test_the_policy_begins_to_learn_when_the_warm_up_has_ended_also_after_a_resume(tmp_path: Path) -> None:
    settings = {
        "critic_warmup_iterations": 5, "critic_warmup_patience": 1, "max_steps": 4, "save_strategy": "steps", "save_steps": 1,
        # A critic that does not learn ends the warm-up after its second iteration.
        "critic_learning_rate": 1e-12,
    }  # fmt: skip
    straight = toy.ppo_trainer(tmp_path / "a", **settings)
    before = straight.model.policy.model.layers[0].mlp.up_proj.weight.detach().clone()
    straight.train()
    moved = [not torch.equal(policy_of(tmp_path / "a", step), before) for step in (1, 2, 3, 4)]
    assert moved == sorted(moved)
    assert (moved[0], moved[-1]) == (False, True)
    first = moved.index(True)
    resumed = toy.ppo_trainer(tmp_path / "b", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{first}"))
    torch.testing.assert_close(toy.weights(resumed.model), toy.weights(straight.model), rtol=0, atol=0)


def test_further_epochs_leave_the_policy_alone_and_fit_the_critic_better(tmp_path: Path) -> None:
    explained, policies = [], []
    for epochs in (0, 8):
        trainer = toy.ppo_trainer(
            tmp_path / str(epochs), extra_critic_epochs=epochs, max_steps=1, value_clip_range=None, vf_coef=1.0, max_grad_norm=0.0,
        )  # fmt: skip
        seen = []
        to_batch = trainer.to_batch
        trainer.to_batch = lambda scored, seen=seen, of=to_batch: seen.append(of(scored)) or seen[-1]  # type: ignore[method-assign]
        trainer.train()
        (batch,) = seen
        _, values, _ = trainer._score_tokens(batch.inputs)
        explained.append(float(explained_variance(values[:, :-1], batch.returns, batch.mask)))
        policies.append(toy.weights(trainer.model.policy))
        (log,) = toy.iteration_logs(trainer)
        assert log["optimizer_steps"] == 4  # those of the policy's epochs
    torch.testing.assert_close(policies[0], policies[1], rtol=0, atol=0)
    assert explained[1] > explained[0] + 0.1
