"""A critic that says how likely each of K values is, and is fitted as a classifier.

The values are bins, evenly spaced from −R to R; the critic's value is their mean under its softmax. A return between two
bins is a target that is split between them such that its mean is the return ("two-hot": Schrittwieser et al. 2020, "Mastering
Atari, Go, chess and shogi by planning with a learned model", appendix F; Hafner et al. 2023, arXiv 2301.04104; for critics of
large networks Farebrother et al. 2024, "Stop Regressing", arXiv 2403.03950). The mean of a target is its return, so that the
best fit to returns that vary has their mean as its value, as the squared error's has; but no return has a gradient that grows
with its distance.

A critic may start from one that gives a single number v: logits of a normal distribution around v, (v·c − c²/2) / s² for the
bin c, are linear in v, and so in the states that v is linear in. Its deviation s is R/10.
"""

import torch
from torch import Tensor

# Below it the bins are wider than s, and the mean of the normal distribution over them is off.
LEAST_BINS = 21


def bin_values(num_bins: int, value_range: float, device: torch.device | None = None) -> Tensor:
    """Values `[K]` of the bins, from −`value_range` to `value_range`."""
    return torch.linspace(-value_range, value_range, num_bins, device=device)


def expected_values(logits: Tensor, value_range: float) -> Tensor:
    """Values `[...]`: mean of the bins under the softmax of logits `[..., K]`."""
    bins = bin_values(logits.shape[-1], value_range, logits.device)
    return torch.softmax(logits.float(), dim=-1) @ bins


def two_hot_loss(logits: Tensor, returns: Tensor, value_range: float) -> Tensor:
    """Cross-entropy of the bins to returns that are split between the two nearest, in nats.

    Args:
        logits: `[..., K]`; the gradient flows into it.
        returns: `[...]`, targets; those outside of ±`value_range` count as its ends.
        value_range: R.

    Returns:
        `[...]`, loss of each element; NaN, without a gradient, where an input is not finite.
    """
    finite = torch.isfinite(returns) & torch.isfinite(logits).all(-1)
    logprobs = torch.log_softmax(torch.where(finite.unsqueeze(-1), logits, 0.0), dim=-1)
    last = logits.shape[-1] - 1
    place = (torch.where(finite, returns, 0.0).clamp(-value_range, value_range) / value_range + 1) * (
        last / 2
    )
    below = place.floor().clamp(max=last - 1)
    share = place - below
    index = below.long().unsqueeze(-1)
    lower, upper = logprobs.gather(-1, index).squeeze(-1), logprobs.gather(-1, index + 1).squeeze(-1)
    return torch.where(finite, -((1 - share) * lower + share * upper), torch.nan)


def head_over_bins(weight: Tensor, num_bins: int, value_range: float) -> Tensor:
    """Weight `[K, d]` of a head whose logits, with `bin_offsets`, have the values of a head of weight `[1, d]`.

    They have within ±R/2; beyond, the distribution is cut off at R, and the value lies nearer to 0.
    """
    bins = bin_values(num_bins, value_range, weight.device).unsqueeze(1)
    return bins * weight.float() / _deviation(value_range) ** 2


def bin_offsets(num_bins: int, value_range: float, bias: float, device: torch.device | None = None) -> Tensor:
    """Constants `[K]` that are added to the logits of such a head.

    Args:
        num_bins: K.
        value_range: R.
        bias: what was added to the single number.
        device: of the result.
    """
    bins = bin_values(num_bins, value_range, device)
    return (bias * bins - bins.square() / 2) / _deviation(value_range) ** 2


def _deviation(value_range: float) -> float:
    return value_range / 10
