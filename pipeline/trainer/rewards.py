"""Scores per completion to rewards per token, and the running statistics that scores are divided by."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tieback.pipeline.rollout.texts import Rollout
from tieback.pipeline.scorers import FunctionRewards


@dataclass
class ScoredRollout:
    """A rollout with its scores.

    Args:
        rollout: B completions.
        rewards: [B, F], what each reward function returned; NaN where it does not judge the row.
        raw_scores: [B], the weighted sum of the rewards.
        token_scores: [B, T], what is paid at each token, 0 behind a completion's end: the raw scores where they were given,
            by token or else at the last one, normalised and clipped where that is set, less the missing-EOS penalty.
    """

    rollout: Rollout
    rewards: Tensor
    raw_scores: Tensor
    token_scores: Tensor

    @property
    def scores(self) -> Tensor:
        """[B], what is paid for each completion: what PPO maximises, but for the KL penalty."""
        return self.token_scores.sum(1)


def place_rewards(
    rewards: Sequence[FunctionRewards], weights: Sequence[float], rollout: Rollout, device: torch.device
) -> Tensor:
    """Weighted rewards of F functions where they are paid: by token, or at the last one where there is one number for all.

    What is given for a token that the policy did not write is paid at the last one before it that it did, or at its first.

    Args:
        rewards: of each function, for B completions.
        weights: F weights.
        rollout: the completions, of at most T tokens.
        device: of the result.

    Returns:
        [B, T] float32, 0 where nothing is paid; a row sums up to what `combine_rewards` gives.
    """
    placed = torch.zeros(len(rollout), max(map(len, rollout.completion_ids)))
    for row in range(len(rollout)):
        written = rollout.written(row)
        for weight, (totals, by_token) in zip(weights, rewards, strict=True):
            tokens = by_token[row]
            if tokens is not None:
                own = torch.tensor(written)
                before = torch.searchsorted(own, torch.arange(len(tokens)), right=True) - 1
                placed[row].index_add_(0, own[before.clamp(min=0)], weight * torch.tensor(tokens))
            elif not math.isnan(totals[row]):
                placed[row, written[-1]] += weight * totals[row]
    return placed.to(device)


def last_written(mask: Tensor) -> Tensor:
    """Place [B, 1] of the last True of each row of a mask [B, T], which has one."""
    places = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, places, -1).amax(dim=1, keepdim=True)


def token_rewards(
    token_scores: Tensor,
    kl: Tensor,
    kl_coef: float,
    mask: Tensor,
    gamma: float,
    bootstrap_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-token rewards and discounts of a batch of completions.

    r_t = score_t − kl_coef·KL_t, where score_t is 0 before the last token unless it was given by token (Ziegler et al. 2019,
    eq. 2; InstructGPT, eq. 2). The discount is gamma, and 0 at the last token, after which nothing follows.

    Args:
        token_scores: [B, T], 0 where the mask is False.
        kl: [B, T] estimate of KL(policy ‖ reference) at each token.
        kl_coef: coefficient of the penalty.
        mask: [B, T] bool, True on the policy's tokens.
        gamma: discount a token.
        bootstrap_values: [B], gamma times which is added at the last token: the critic's value of the state
            that a cut completion would have gone on from, 0 for a finished one.

    Returns:
        `rewards` and `discounts`, both [B, T] float32.
    """
    is_last = torch.arange(mask.shape[1], device=mask.device) == last_written(mask)
    paid = token_scores
    if bootstrap_values is not None:
        paid = paid + torch.where(is_last, gamma * bootstrap_values.unsqueeze(1), 0.0)
    rewards = torch.where(mask, -kl_coef * kl, 0.0) + paid
    discounts = torch.where(is_last, 0.0, gamma).to(rewards.dtype)
    return rewards, discounts


def overlong_shares(rollout: Rollout, max_length: int, buffer_length: int | None) -> Tensor:
    """Share of the missing-EOS penalty that each of B completions is charged: 1 where it was cut.

    With a buffer, one that ended by itself within the last `buffer_length` tokens before the limit is charged a share that
    rises from 0 to 1 over them (Yu et al. 2025 (DAPO), eq. 13); none otherwise.

    Args:
        rollout: B completions.
        max_length: most tokens in a completion.
        buffer_length: number of those last tokens; None for no such share.

    Returns:
        [B] float32, on the CPU.
    """
    cut = torch.tensor(rollout.truncated, dtype=torch.float32)
    if buffer_length is None:
        return cut
    lengths = torch.tensor([len(ids) for ids in rollout.completion_ids])
    return torch.maximum(cut, ((lengths - (max_length - buffer_length)) / buffer_length).clamp(0, 1))


class RunningMoments:
    """Mean and variance of all scores so far, over all processes (Chan et al. 1979, parallel variance)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self.sum_of_squares = 0.0

    def update(self, scores: Tensor) -> None:
        """Take in scores [N], already gathered from all processes."""
        values = scores.double()
        count, mean = values.numel(), float(values.mean())
        total = self.count + count
        delta = mean - self.mean
        self.sum_of_squares += float((values - mean).square().sum()) + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.count = total

    @property
    def std(self) -> float:
        """Standard deviation (unbiased); 1 before there are two scores, or where all are equal."""
        if self.count < 2 or self.sum_of_squares == 0:
            return 1.0
        return math.sqrt(self.sum_of_squares / (self.count - 1))

    def state_dict(self) -> dict[str, float]:
        """State as JSON numbers."""
        return {"count": self.count, "mean": self.mean, "sum_of_squares": self.sum_of_squares}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what `state_dict` gave."""
        self.count = int(state["count"])
        self.mean = float(state["mean"])
        self.sum_of_squares = float(state["sum_of_squares"])


class MomentsOfEach:
    """`RunningMoments` of each of F reward functions; the rows that one does not judge are left out of its own."""

    def __init__(self, count: int) -> None:
        self.functions = [RunningMoments() for _ in range(count)]

    def update(self, rewards: Tensor) -> None:
        """Take in rewards [N, F], NaN where a function does not judge, already gathered from all processes."""
        for moments, column in zip(self.functions, rewards.T, strict=True):
            judged = column[~torch.isnan(column)]
            if len(judged):
                moments.update(judged)

    @property
    def stds(self) -> list[float]:
        """Standard deviation of each function (see `RunningMoments.std`)."""
        return [moments.std for moments in self.functions]

    def state_dict(self) -> dict[str, list[dict[str, float]]]:
        """State as JSON numbers."""
        return {"functions": [moments.state_dict() for moments in self.functions]}

    def load_state_dict(self, state: dict[str, list[dict[str, float]]]) -> None:
        """Restore what `state_dict` gave."""
        for moments, saved in zip(self.functions, state["functions"], strict=True):
            moments.load_state_dict(saved)
