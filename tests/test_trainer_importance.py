"""Truncated importance sampling: weights by formula, and what it mends where the sampler is not the policy."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import test_optimum as language
import torch
import toy
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor

from tieback.pipeline.trainer import PPOConfig, PPOTrainer
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


def test_an_engine_whose_temperature_is_off_by_5_percent_moves_the_policy_and_weights_bring_it_back() -> None:
    best = climbed(1.0, None)
    moved, lost = {}, {}
    for level in (None, "sequence"):
        policy = climbed(0.95, level)
        moved[level] = (policy.softmax(-1) - best.softmax(-1)).abs().sum().item()
        lost[level] = (objective(best) - objective(policy)).item()
    # J is flat about its optimum: what is lost is of the second order.
    assert moved[None] > 5e-3
    assert lost[None] > 1e-5
    assert moved["sequence"] < 1e-5
    assert abs(lost["sequence"]) < 1e-9


def off_by_five_percent(folder: Path, **settings: Any) -> tuple[PPOTrainer, torch.nn.Module]:
    """PPO on the enumerable language of test_optimum, whose sampler has a temperature of 0.95 instead of 1."""
    torch.manual_seed(0)
    vocabulary = {"vocab_size": len(language.WORDS), "eos_token_id": language.END, "pad_token_id": 0}
    policy = toy.LlamaForCausalLM(toy.config(**vocabulary, max_position_embeddings=16))
    args = PPOConfig(
        output_dir=str(folder), per_device_train_batch_size=256, max_steps=40,
        max_completion_length=language.LENGTH, num_minibatches=2, num_ppo_epochs=4, kl_coef=language.BETA,
        missing_eos_penalty=language.PENALTY, learning_rate=3e-3, gae_lambda=1.0, vf_coef=0.5, value_clip_range=None,
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, seed=0, **settings,
    )  # fmt: skip
    prompts = Dataset.from_dict({"prompt": ["q"] * 256})
    trainer = PPOTrainer(policy, language.reward, args, prompts, None, language.six_words())
    trainer.sampler.config.temperature = 0.95
    return trainer, policy


def test_ppo_with_an_engine_that_is_off_reaches_the_optimum_with_weights_and_is_refused_without(
    tmp_path: Path,
) -> None:
    trainer, _ = off_by_five_percent(tmp_path / "without")
    with pytest.raises(SelfCheckError, match="disagree"):
        trainer.train()

    trainer, policy = off_by_five_percent(tmp_path / "with", importance_sampling="sequence")
    prompt = language.six_words()("q")["input_ids"]
    log_reference = language.log_distribution(policy, prompt)
    rewards = torch.tensor(
        [
            language.reward_of(ids) - language.PENALTY * (ids[-1] != language.END)
            for ids in language.all_responses()
        ],
        dtype=torch.float64,
    )
    trainer.train()
    log_policy = language.log_distribution(policy, prompt)
    best = language.BETA * torch.logsumexp(log_reference + rewards / language.BETA, dim=0)
    reached = (log_policy.exp() * (rewards - language.BETA * (log_policy - log_reference))).sum()
    assert reached >= 0.98 * best
    logs = toy.iteration_logs(trainer)
    # The mean of π / μ over what μ has drawn is 1, but for chance and the cap.
    assert sum(log["rollout/importance_weight_mean"] for log in logs) / len(logs) == pytest.approx(
        1, abs=0.01
    )
    assert logs[0]["rollout/logprob_gap_mean"] > 1e-3
    assert all(log["rollout/importance_capped_fraction"] == 0 for log in logs)
