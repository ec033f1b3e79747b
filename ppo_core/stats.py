"""The figures of an update: sums over unmasked elements while it runs, means of them at its end."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tieback.ppo_core.advantages import masked_sum
from tieback.ppo_core.batch import Batch
from tieback.ppo_core.objective import PPOHyperparameters, kl_estimate

# What `element_sums` sums, in its order.
FIGURES = (
    "policy_loss",
    "value_loss",
    "entropy",
    "approx_kl",
    "ratio",
    "clip_fraction",
    "value_clip_fraction",
)


class Outcome(NamedTuple):
    """What became of a minibatch.

    Args:
        sums: `FIGURES` summed over all ranks.
        num_elements: number of elements in the sums.
        max_abs_log_ratio: greatest |log ratio| on this rank, a scalar.
        too_far: whether the approximate KL is past its limit.
        grad_norm: norm of the gradient before clipping; None where no step was taken.
    """

    sums: list[float]
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
        policy_loss: clipped surrogate, without the entropy bonus.
        value_loss: clipped squared error, before its coefficient.
        entropy: of the policy, in nats.
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

    policy_loss: float
    value_loss: float
    entropy: float
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

    def metrics(self) -> dict[str, float]:
        """Return the figures under the names that they are logged by."""
        return {
            "policy/loss": self.policy_loss,
            "policy/approx_kl": self.approx_kl,
            "policy/clip_fraction": self.clip_fraction,
            "policy/entropy": self.entropy,
            "policy/ratio": self.ratio,
            "value/loss": self.value_loss,
            "value/clip_fraction": self.value_clip_fraction,
            "value/explained_variance": self.explained_variance,
            "grad_norm": self.grad_norm,
            "optimizer_steps": float(self.optimizer_steps),
        }


@torch.no_grad()
def element_sums(
    micro_batch: Batch,
    logprobs: Tensor,
    values: Tensor,
    entropies: Tensor,
    policy_losses: Tensor,
    value_losses: Tensor,
    hyper: PPOHyperparameters,
) -> Tensor:
    """Sum each of `FIGURES` over the unmasked elements of a micro-batch.

    Args:
        micro_batch: B rows of T steps.
        logprobs: `[B, T]`, of the policy, as are the four that follow.
        values: `[B, T]`.
        entropies: `[B, T]`.
        policy_losses: `[B, T]`.
        value_losses: `[B, T]`.
        hyper: clip ranges.

    Returns:
        `[len(FIGURES)]`.
    """
    ratio = torch.exp(logprobs - micro_batch.old_logprobs)
    upper = 1 + (hyper.clip_range if hyper.clip_range_high is None else hyper.clip_range_high)
    clipped_ratio = ratio.clamp(1 - hyper.clip_range, upper)
    clipped = clipped_ratio * micro_batch.advantages < ratio * micro_batch.advantages
    squares = (values - micro_batch.returns).square()
    figures = {
        "policy_loss": policy_losses,
        "value_loss": value_losses,
        "entropy": entropies,
        "approx_kl": kl_estimate(micro_batch.old_logprobs, logprobs, "k3"),
        "ratio": ratio,
        "clip_fraction": clipped.to(ratio.dtype),
        # The clipped loss is the greater of the two; its rounding is the same where it is not.
        "value_clip_fraction": (2 * value_losses > squares).to(ratio.dtype),
    }
    return torch.stack([masked_sum(figures[name], micro_batch.mask) for name in FIGURES])


def summarise(
    epochs: Sequence[Sequence[Outcome]], critic_quality: float, max_abs_log_ratio_first: float
) -> PPOStats:
    """Turn the outcomes of all minibatches, by epoch, into the figures of the update.

    Args:
        epochs: for each epoch, at least one outcome.
        critic_quality: explained variance of the whole batch.
        max_abs_log_ratio_first: of the first minibatch, over all ranks.
    """
    overall = _means([outcome for outcomes in epochs for outcome in outcomes])
    by_epoch = [_means(outcomes) for outcomes in epochs]
    grad_norms = [
        outcome.grad_norm for outcomes in epochs for outcome in outcomes if outcome.grad_norm is not None
    ]
    return PPOStats(
        **overall,
        explained_variance=critic_quality,
        grad_norm=sum(grad_norms) / len(grad_norms) if grad_norms else math.nan,
        optimizer_steps=len(grad_norms),
        stopped_early=epochs[-1][-1].too_far,
        max_abs_log_ratio_first=max_abs_log_ratio_first,
        approx_kl_by_epoch=[means["approx_kl"] for means in by_epoch],
        ratio_by_epoch=[means["ratio"] for means in by_epoch],
        clip_fraction_by_epoch=[means["clip_fraction"] for means in by_epoch],
    )


def _means(outcomes: Sequence[Outcome]) -> dict[str, float]:
    count = sum(outcome.num_elements for outcome in outcomes)
    totals = [sum(column) for column in zip(*(outcome.sums for outcome in outcomes), strict=True)]
    return {name: total / count for name, total in zip(FIGURES, totals, strict=True)}
