"""Advantages and masked statistics.

Tensors are float32 `[B, T]`, one row a trajectory, with a bool mask `[B, T]` that is True where a step counts.
Whatever stands under the mask, NaN included, changes neither a result nor a gradient.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


def gae(
    rewards: Tensor,
    discounts: Tensor,
    values: Tensor,
    gae_lambda: float | Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Generalised advantage estimation.

        δ_t = r_t + γ_t V_{t+1} − V_t
        A_t = δ_t + γ_t λ A_{t+1}

    Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation", eq. 16, in
    its recursive form, with a discount γ_t for each step: gamma, or 0 where nothing follows (the end of an
    episode, the last token).

    A masked step is treated as if it were not in the row, wherever it stands: the step before it is followed by
    the next unmasked one, or by the bootstrap value where none is left.

    Args:
        rewards: `[B, T]`, reward of each step.
        discounts: `[B, T]`, discount of what follows each step.
        values: `[B, T + 1]`, the critic's values; the last column is the bootstrap, not read after a discount of 0.
        gae_lambda: λ in [0, 1]; one for all rows, or `[B]`.
        mask: bool `[B, T]`; every step counts when None.

    Returns:
        `[B, T]` advantages, 0 at masked steps.

    Raises:
        ValueError: the shapes do not fit together.
    """
    num_rows, num_steps = rewards.shape
    if mask is None:
        mask = torch.ones_like(rewards, dtype=torch.bool)
    if values.shape != (num_rows, num_steps + 1):
        raise ValueError(
            f"values must be [B, T + 1] = [{num_rows}, {num_steps + 1}] for rewards of shape "
            f"{list(rewards.shape)} (its last column is the bootstrap value), but is {list(values.shape)}."
        )
    if discounts.shape != rewards.shape or mask.shape != rewards.shape:
        raise ValueError(
            f"discounts {list(discounts.shape)} and mask {list(mask.shape)} must have the shape of rewards, "
            f"{list(rewards.shape)}."
        )
    mask = mask.bool()
    next_value, next_advantage = values[:, -1], torch.zeros_like(values[:, -1])
    advantages = []
    for t in reversed(range(num_steps)):
        # The where keeps 0 · NaN out: nothing is read of a value that nothing leads to.
        future = torch.where(
            discounts[:, t] == 0, 0.0, discounts[:, t] * (next_value + gae_lambda * next_advantage)
        )
        advantage = rewards[:, t] + future - values[:, t]
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        advantages.append(torch.where(mask[:, t], advantage, 0.0))
    return torch.stack(advantages[::-1], dim=1) if advantages else torch.zeros_like(rewards)


def length_adaptive_lambda(lengths: Tensor, alpha: float) -> Tensor:
    """λ of each row by its length: 1 − 1/(α·l), and 0 where that is negative.

    Long rows hear of a reward at their end, short ones have little variance. Yue et al. 2025 (VAPO), eq. 7, where α
    is 0.05.

    Args:
        lengths: `[B]`, number l ≥ 1 of unmasked steps of each row.
        alpha: α > 0.

    Returns:
        `[B]`, in [0, 1).
    """
    return (1 - 1 / (alpha * lengths)).clamp(min=0.0)


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of `x` where `mask` is True; a scalar."""
    return torch.where(mask.bool(), x, 0.0).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` where `mask` is True; a scalar, 0 where nothing is unmasked."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def whiten(
    x: Tensor, mask: Tensor, shift_mean: bool = True, accelerator: "Accelerator | None" = None
) -> Tensor:
    """Scale `x` to variance 1, with the mean and the (population) variance of all unmasked elements on all ranks.

        (x − mean) / √(var + 1e-8), plus the mean again where `shift_mean` is False

    Args:
        x: `[B, T]`; B may be 0 on a rank.
        mask: bool `[B, T]`.
        shift_mean: move the mean to 0; else it stays what it was.
        accelerator: reduces the statistics over its processes, all of which must call; this process alone when None.

    Returns:
        `[B, T]`, 0 where masked.
    """
    mean, variance = _mean_and_variance(x, mask, accelerator)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask.bool(), whitened if shift_mean else whitened + mean, 0.0)


def explained_variance(
    values: Tensor, returns: Tensor, mask: Tensor, accelerator: "Accelerator | None" = None
) -> Tensor:
    """Share of the returns' variance that the critic explains: 1 − Var(returns − values) / Var(returns).

    1 for a perfect critic, 0 for one no better than a constant, negative for a worse one.

    Args:
        values: `[B, T]`, predictions.
        returns: `[B, T]`, targets.
        mask: bool `[B, T]`.
        accelerator: reduces the statistics over its processes, all of which must call; this process alone when None.

    Returns:
        A scalar; NaN where the returns do not vary.
    """
    _, residual_variance = _mean_and_variance(returns - values, mask, accelerator)
    _, variance = _mean_and_variance(returns, mask, accelerator)
    return torch.where(variance > 0, 1 - residual_variance / variance, torch.nan)


def _mean_and_variance(x: Tensor, mask: Tensor, accelerator: "Accelerator | None") -> tuple[Tensor, Tensor]:
    """Masked mean and population variance over all ranks; in two passes, as one would cancel digits."""

    def total(tensor: Tensor) -> Tensor:
        return tensor if accelerator is None else accelerator.reduce(tensor, "sum")

    sum_and_count = total(torch.stack([masked_sum(x, mask), mask.sum().to(x.dtype)]))
    count = sum_and_count[1].clamp(min=1)
    mean = sum_and_count[0] / count
    return mean, total(masked_sum((x - mean).square(), mask)) / count
