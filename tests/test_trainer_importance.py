"""Truncated importance sampling: weights by formula, and what it mends where the sampler is not the policy."""

import itertools
import math
from pathlib import Path

import pytest
import test_optimum as language
import torch
import toy
from accelerate import Accelerator
from torch import Tensor

from tieback.pipeline.trainer.importance import importance_figures, importance_weights
from tieback.pipeline.trainer.ratio_checks import SelfCheckError
from tieback.ppo_core import Batch, PolicyOutputs, PPOHyperparameters, ppo_terms

MASK = torch.tensor([[True, True, True], [True, False, False]])
SCORED = torch.tensor([[-1.0, -2.0, -0.5], [-1.0, math.nan, math.inf]])
DRAWN = [[-1.5, -1.0, -0.5], [-3.0]]


def test_weights_are_the_capped_ratios_of_tokens_or_of_completions() -> None:
    by_token = importance_weights(DRAWN, SCORED, MASK, "token", 2.0)
    expected = torch.tensor([[math.exp(0.5), math.exp(-1.0), 1.0], [2.0, 0.0, 0.0]])
    torch.testing.assert_close(by_token, expected)
    by_sequence = importance_weights(DRAWN, SCORED, MASK, "sequence", 3.0)
    expected = torch.tensor([[math.exp(-0.5)] * 3, [3.0, 0.0, 0.0]])
    torch.testing.assert_close(by_sequence, expected)


def test_the_figures_are_means_over_tokens() -> None:
    weights = importance_weights(DRAWN, SCORED, MASK, "token", 2.0)
    figures = importance_figures(weights, MASK, 2.0, Accelerator(cpu=True))
    assert figures["rollout/importance_weight_mean"] == pytest.approx(float(weights.sum()) / 4)
    assert figures["rollout/importance_capped_fraction"] == 0.25


# A policy of too few parameters for its problem: one distribution over three tokens, for all three places of a
# completion. Its advantages do not vanish at the optimum, so that a sampler that is off moves what it comes to.
RESPONSES = torch.tensor(list(itertools.product(range(3), repeat=3)))
REWARDS = 2 * torch.randn(27, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
REFERENCE = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64).log_softmax(-1)
BETA = 0.3


def token_logprobs(logits: Tensor) -> Tensor:
    """Log-probabilities [27, 3] of the tokens of every response."""
    return logits.log_softmax(-1)[RESPONSES]


def objective(logits: Tensor) -> Tensor:
    """J = E[r] − β·KL, over all responses."""
    logprobs = token_logprobs(logits).sum(1)
    return (logprobs.exp() * (REWARDS - BETA * (logprobs - REFERENCE[RESPONSES].sum(1)))).sum()


def expected_gradient(logits: Tensor, temperature: float, level: str | None, cap: float = 1e9) -> Tensor:
    """Gradient of PPO's loss at its first step, in expectation over what an engine at `temperature` samples."""
    logits = logits.detach().requires_grad_()
    logprobs = token_logprobs(logits)
    drawn = token_logprobs(logits.detach() / temperature)
    old = logprobs.detach()
    # With λ = γ = 1 and no critic, the advantage of a token is what is still to come, here with the KL of before, too.
    returns = REWARDS - BETA * (old - REFERENCE[RESPONSES]).sum(1)
    probability = drawn.sum(1).exp()
    batch = Batch(
        inputs={},
        old_logprobs=old,
        old_values=torch.zeros_like(old),
        advantages=(probability * returns).unsqueeze(1).expand_as(old),
        returns=torch.zeros_like(old),
        mask=torch.ones_like(old, dtype=torch.bool),
    )
    if level is not None:
        batch.importance_weights = importance_weights(drawn.tolist(), old, batch.mask, level, cap)
    term = ppo_terms(batch, PolicyOutputs(logprobs, old * 0, old * 0), PPOHyperparameters())["policy/loss"]
    return torch.autograd.grad(-term.elements.sum(), logits)[0]


def climbed(temperature: float, level: str | None, cap: float = 1e9) -> Tensor:
    logits = torch.zeros(3, dtype=torch.float64)
    for _ in range(1500):
        logits = logits + 0.1 * expected_gradient(logits, temperature, level, cap)
    return logits


def test_with_weights_by_sequence_the_expected_gradient_is_that_of_the_policy() -> None:
    logits = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64, requires_grad=True)
    exact = torch.autograd.grad(objective(logits), logits)[0]
    torch.testing.assert_close(expected_gradient(logits, 1.0, None), exact, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(expected_gradient(logits, 0.95, "sequence"), exact, rtol=1e-5, atol=1e-6)
    errors = [
        (expected_gradient(logits, 0.95, level) - exact).norm() / exact.norm() for level in (None, "token")
    ]
    # By token, the states are still those of the engine.
    assert 0.02 < errors[1] < errors[0]


@pytest.mark.slow
def test_an_engine_whose_temperature_is_off_by_5_percent_moves_the_policy_and_weights_bring_it_back() -> None:
    best = climbed(1.0, None)
    moved, lost = {}, {}
    for level in (None, "token", "sequence"):
        policy = climbed(0.95, level)
        moved[level] = (policy.softmax(-1) - best.softmax(-1)).abs().sum().item()
        lost[level] = (objective(best) - objective(policy)).item()
    # J is flat about its optimum: what is lost is of the second order.
    assert moved[None] > 5e-3
    assert lost[None] > 1e-5
    assert moved["token"] < 0.2 * moved[None]
    assert moved["sequence"] < 1e-5
    assert abs(lost["sequence"]) < 1e-9


@pytest.mark.slow
def test_ppo_with_an_engine_that_is_off_reaches_the_optimum_with_weights_and_is_refused_without(
    tmp_path: Path,
) -> None:
    trainer = language.language_trainer(tmp_path / "without")
    trainer.sampler.config.temperature = 0.95
    with pytest.raises(SelfCheckError, match="disagree"):
        trainer.train()

    trainer = language.language_trainer(tmp_path / "with", importance_sampling="sequence")
    trainer.sampler.config.temperature = 0.95
    assert language.train_and_compare(trainer)[1] >= 0.98
    logs = toy.iteration_logs(trainer)
    # The mean of π / μ over what μ has drawn is 1, but for chance and the cap.
    mean = sum(log["rollout/importance_weight_mean"] for log in logs) / len(logs)
    assert mean == pytest.approx(1, abs=0.01)
    assert logs[0]["rollout/logprob_gap_mean"] > 1e-3
    assert all(log["rollout/importance_capped_fraction"] == 0 for log in logs)


def test_the_cap_of_a_run_is_that_of_its_settings(tmp_path: Path) -> None:
    trainer = language.language_trainer(
        tmp_path, importance_sampling="token", importance_sampling_cap=1.0, max_steps=1
    )
    trainer.sampler.config.temperature = 0.95
    trainer.train()
    (log,) = toy.iteration_logs(trainer)
    # About half of the tokens are likelier by the policy than by the sampler, and none counts for more than 1.
    assert 0.2 < log["rollout/importance_capped_fraction"] < 0.8
    assert log["rollout/importance_weight_mean"] < 1
