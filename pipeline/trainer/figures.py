"""Figures of a rollout, for each completion and as means, by the names that they are logged under."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tieback.pipeline.trainer.rewards import ScoredRollout


def sequence_kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Each completion's KL to the reference [B] in nats: the k1 sum, unbiased whichever estimator the reward uses.

    Args:
        logprobs: [B, T], log-probabilities of the tokens.
        ref_logprobs: [B, T], the same under the reference.
        mask: bool [B, T], True on the policy's tokens.
    """
    return torch.where(mask, logprobs - ref_logprobs, 0.0).sum(1)


def rollout_figures(scored: ScoredRollout, kl: Tensor, reward_names: Sequence[str]) -> dict[str, Tensor]:
    """Figures of each of B completions.

    Args:
        scored: the rollout.
        kl: [B], see `sequence_kl`.
        reward_names: names of the reward functions, in the order of the columns of `scored.rewards`.

    Returns:
        Each [B]; the reward of a function is NaN where it does not judge.
    """
    rollout = scored.rollout
    return {
        "reward/mean": scored.raw_scores,
        "reward/normalized_mean": scored.scores,
        "kl/ref": kl,
        "completions/mean_length": torch.tensor(
            [float(len(rollout.written(row))) for row in range(len(rollout))], device=kl.device
        ),
        "completions/truncated_fraction": torch.tensor(rollout.truncated, device=kl.device).float(),
        **{f"reward/{name}": column for name, column in zip(reward_names, scored.rewards.T, strict=True)},
    }


def std_within_prompt(scores: Tensor, num_generations: int) -> Tensor:
    """Standard deviation of the scores of each prompt's completions, at each of them: [B].

    Args:
        scores: [B], those of a prompt next to each other.
        num_generations: completions of a prompt.
    """
    by_prompt = scores.view(-1, num_generations)
    return by_prompt.std(dim=1, correction=0).repeat_interleave(num_generations)


def figure_names(reward_names: Sequence[str]) -> list[str]:
    """Names of all that `mean_figures` gives for rewards of these names."""
    return [
        "reward/mean",
        "reward/normalized_mean",
        "kl/ref",
        "completions/mean_length",
        "completions/truncated_fraction",
        *(f"reward/{name}" for name in reward_names),
        "reward/std",
    ]


def mean_figures(figures: Mapping[str, Tensor]) -> dict[str, float]:
    """Means over completions, NaN left out, and the standard deviation of the raw scores."""
    table = torch.stack(list(figures.values()), dim=1)
    means = dict(zip(figures, table.nanmean(dim=0).tolist(), strict=True))
    scores = table[:, list(figures).index("reward/mean")]
    return {**means, "reward/std": float(scores.std(correction=0))}
