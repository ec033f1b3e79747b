"""The figures of an update: sums over unmasked elements while it runs, means of them at its end."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tieback.ppo_core.batch import Batch
from tieback.ppo_core.hyperparameters import PPOHyperparameters
from tieback.ppo_core.objective import PolicyOutputs, Term, clip_bounds, kl_estimate, value_loss


class Outcome(NamedTuple):
    """What became of a minibatch.

    Args:
        terms: for each term of the loss, the sum of its elements over all ranks.
        diagnostics: the same for each of `diagnostics`.
        num_elements: number of elements in the sums.
        max_abs_log_ratio: greatest |log ratio| on this rank, a scalar.
        too_far: whether the approximate KL is past its limit.
        grad_norm: norm of the gradient before clipping; None where no step was taken.
    """

    terms: dict[str, float]
    diagnostics: dict[str, float]
    num_elements: int
    max_abs_log_ratio: Tensor
    too_far: bool
    grad_norm: float | None


@dataclass
class PPOStats:
    """What an update did.

    Each figure is a mean over the unmasked elements of all minibatches, on all ranks: it does not depend on padding,
    on the micro-batch size or on the number of processes. Each minibatch is measured before its own step.

    Args:
        terms: each term of the loss, before its coefficient, by its name in `ppo_terms`.
        approx_kl: k3 estimate of KL(rollout's policy ‖ policy), in nats.
        ratio: probability of an action under the policy, divided by that under the rollout's.
        clip_fraction: share of elements where the clipped surrogate was the lower one.
        value_clip_fraction: share of elements where the clipped value loss was the higher one.
        explained_variance: of the returns by the rollout's values; NaN where the returns do not vary.
        grad_norm: mean norm of the gradient before clipping; NaN where no step was taken or DeepSpeed without ZeRO
            does not tell it.
        optimizer_steps: number of steps taken.
        stopped_early: whether `target_kl` ended the update.
        max_abs_log_ratio_first: greatest |log ratio| of the first minibatch, before any step: 0 up to rounding
            where `evaluate` gives the rollout's log-probabilities back.
        approx_kl_by_epoch: `approx_kl` of each epoch.
        ratio_by_epoch: `ratio` of each epoch.
        clip_fraction_by_epoch: `clip_fraction` of each epoch.
    """

    terms: dict[str, float]
    approx_kl: float
    ratio: float
    clip_fraction: float
    value_clip_fraction: float
    explained_variance: float
    grad_norm: float
    optimizer_steps: int
    stopped_early: bool
    max_abs_log_ratio_first: float
    approx_kl_by_epoch: list[float]
    ratio_by_epoch: list[float]
    clip_fraction_by_epoch: list[float]

    @property
    def policy_loss(self) -> float:
        """Clipped surrogate, negated, without the entropy bonus."""
        return self.terms["policy/loss"]

    @property
    def value_loss(self) -> float:
        """Clipped error of the critic, before its coefficient."""
        return self.terms["value/loss"]

    @property
    def entropy(self) -> float:
        """Entropy of the policy, in nats."""
        return self.terms["policy/entropy"]

    def metrics(self) -> dict[str, float]:
        """Return the figures under the names that they are logged by."""
        return {
            **self.terms,
            "policy/approx_kl": self.approx_kl,
            "policy/clip_fraction": self.clip_fraction,
            "policy/ratio": self.ratio,
            "value/clip_fraction": self.value_clip_fraction,
            "value/explained_variance": self.explained_variance,
            "grad_norm": self.grad_norm,
            "optimizer_steps": float(self.optimizer_steps),
        }


@torch.no_grad()
def diagnostics(
    batch: Batch, outputs: PolicyOutputs, terms: Mapping[str, Term], hyper: PPOHyperparameters
) -> dict[str, Tensor]:
    """Figures that are no terms of the loss, by their names in `PPOStats`.

    Args:
        batch: B rows of T steps.
        outputs: of the policy on `batch`.
        terms: of the loss on both.
        hyper: clip ranges.

    Returns:
        Each `[B, T]`.
    """
    ratio = torch.exp(outputs.logprobs - batch.old_logprobs)
    lower, upper = clip_bounds(hyper.clip_range, hyper.clip_range_high)
    clipped = ratio.clamp(lower, upper) * batch.advantages < ratio * batch.advantages
    value_clipped = torch.zeros_like(ratio)
    if hyper.value_clip_range is not None:
        # The clipped loss is the greater of the two; its rounding is the same where it is not.
        unclipped = value_loss(outputs.values, batch.old_values, batch.returns, huber_delta=hyper.huber_delta)
        value_clipped = (terms["value/loss"].elements > unclipped).to(ratio.dtype)
    return {
        "approx_kl": kl_estimate(batch.old_logprobs, outputs.logprobs, "k3"),
        "ratio": ratio,
        "clip_fraction": clipped.to(ratio.dtype),
        "value_clip_fraction": value_clipped,
    }


def summarize(
    epochs: Sequence[Sequence[Outcome]], critic_quality: float, max_abs_log_ratio_first: float
) -> PPOStats:
    """Turn the outcomes of all minibatches, by epoch, into the figures of the update.

    Args:
        epochs: for each epoch, at least one outcome.
        critic_quality: explained variance of the whole batch.
        max_abs_log_ratio_first: of the first minibatch, over all ranks.
    """
    minibatches = [outcome for outcomes in epochs for outcome in outcomes]
    terms, figures = _means(minibatches)
    by_epoch = [_means(outcomes)[1] for outcomes in epochs]
    grad_norms = [outcome.grad_norm for outcome in minibatches if outcome.grad_norm is not None]
    return PPOStats(
        terms=terms,
        **figures,
        explained_variance=critic_quality,
        grad_norm=sum(grad_norms) / len(grad_norms) if grad_norms else math.nan,
        optimizer_steps=len(grad_norms),
        stopped_early=epochs[-1][-1].too_far,
        max_abs_log_ratio_first=max_abs_log_ratio_first,
        approx_kl_by_epoch=[means["approx_kl"] for means in by_epoch],
        ratio_by_epoch=[means["ratio"] for means in by_epoch],
        clip_fraction_by_epoch=[means["clip_fraction"] for means in by_epoch],
    )


def _means(outcomes: Sequence[Outcome]) -> tuple[dict[str, float], dict[str, float]]:
    """Means of the terms and of the diagnostics over all elements of the minibatches."""
    count = sum(outcome.num_elements for outcome in outcomes)

    def means(sums: list[dict[str, float]]) -> dict[str, float]:
        return {name: sum(part[name] for part in sums) / count for name in sums[0]}

    return means([outcome.terms for outcome in outcomes]), means(
        [outcome.diagnostics for outcome in outcomes]
    )
