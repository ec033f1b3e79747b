"""Truncated importance sampling: what to multiply the policy's loss by where the sampler is not quite the policy."""

from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tieback.pipeline.rollout.texts import Rollout
from tieback.pipeline.trainer.config import PPOConfig
from tieback.pipeline.trainer.ratio_checks import as_rows, sampling_gap
from tieback.ppo_core import Batch


def compare_with_sampler(
    batch: Batch, rollout: Rollout, model: nn.Module, accelerator: Accelerator, args: PPOConfig
) -> tuple[Batch, dict[str, float]]:
    """The batch, with importance weights where they are asked for, and how far the sampler is from scoring, where it tells.

    Args:
        batch: of the rollout, its mask True on the policy's tokens.
        rollout: B completions.
        model: what is trained.
        accelerator: of the training; all processes must call.
        args: settings.

    Raises:
        SelfCheckError: they differ by more than rounding.
    """
    if rollout.logprobs is None:
        return batch, {}
    drawn, scored, mask = rollout.logprobs, batch.old_logprobs, batch.mask
    level, cap = args.importance_sampling, args.importance_sampling_cap
    figures = sampling_gap(drawn, scored, mask, model, accelerator, corrected=level is not None)
    if level is None:
        return batch, figures
    weights = importance_weights(drawn, scored, mask, level, cap)
    figures |= importance_figures(weights, mask, cap, accelerator)
    return replace(batch, importance_weights=weights), figures


def importance_weights(
    drawn: list[list[float]], scored: Tensor, mask: Tensor, level: str, cap: float
) -> Tensor:
    """min(π / μ, cap), where π is the policy as it is scored and μ what the sampler drew from.

    By token, π / μ is that of the token alone: the states that the sampler has led to stay as they are. By sequence it
    is the product over the completion, which is unbiased up to the cap and varies more. Yao et al. 2025, "Your
    Efficient RL Framework Secretly Brings You Off-Policy RL Training"; Ionides 2008, "Truncated Importance Sampling".

    Args:
        drawn: log μ of each token of B completions.
        scored: [B, T], log π of the same tokens.
        mask: bool [B, T], True on the policy's tokens.
        level: token or sequence.
        cap: greatest weight.

    Returns:
        [B, T], 0 where masked.
    """
    log_ratios = torch.where(mask, scored - as_rows(drawn, scored), 0.0)
    if level == "sequence":
        log_ratios = log_ratios.sum(1, keepdim=True).expand_as(log_ratios)
    return torch.where(mask, log_ratios.exp().clamp(max=cap), 0.0)


def importance_figures(
    weights: Tensor, mask: Tensor, cap: float, accelerator: Accelerator
) -> dict[str, float]:
    """`rollout/importance_weight_mean` and `rollout/importance_capped_fraction`, over the tokens of all processes.

    Args:
        weights: [B, T], of `importance_weights`.
        mask: bool [B, T].
        cap: greatest weight.
        accelerator: of the training; all processes must call.
    """
    own = torch.stack([weights.sum(), ((weights >= cap) & mask).sum(), mask.sum()])
    total, capped, count = accelerator.reduce(own, "sum").tolist()
    return {
        "rollout/importance_weight_mean": total / count,
        "rollout/importance_capped_fraction": capped / count,
    }
