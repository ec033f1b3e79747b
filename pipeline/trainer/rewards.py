"""Scores of completions from reward functions and reward models, and the per-token rewards that PPO maximises."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tieback.cli.errors import UsageError
from tieback.pipeline.trainer.rollout import Rollout
from tieback.reward_model.scoring import RewardScorer

RewardFunction = Callable[..., list[float | None]]


class RewardError(UsageError):
    """A reward function returned something that cannot be learnt from."""


def reward_name(function: RewardFunction | RewardScorer) -> str:
    """Name under which a reward function's mean is logged."""
    if isinstance(function, RewardScorer):
        return function.name
    return str(getattr(function, "__name__", type(function).__name__))


def unique_reward_names(functions: list[RewardFunction | RewardScorer]) -> list[str]:
    """Each function's name, numbered (`score_2`) where another one, or a statistic of all rewards, has it already."""
    names: list[str] = []
    for function in functions:
        name, number = reward_name(function), 1
        unique = name
        while unique in ("mean", "std", "normalized_mean", *names):
            number += 1
            unique = f"{name}_{number}"
        names.append(unique)
    return names


def call_reward_function(function: RewardFunction | RewardScorer, rollout: Rollout) -> list[float]:
    """One function's rewards for a rollout: B floats, NaN where it returned None (it does not judge that row).

    Raises:
        RewardError: it raised, returned the wrong number of rewards, or something that is not a finite number.
    """
    name = reward_name(function)
    try:
        if isinstance(function, RewardScorer):
            rewards: Any = function.score(rollout.prompts, rollout.completions)
        else:
            rewards = function(
                prompts=rollout.prompts,
                completions=rollout.completions,
                completion_ids=rollout.completion_ids,
                **rollout.columns,
            )
    except Exception as error:
        raise RewardError(
            f"The reward function `{name}` raised {type(error).__name__}: {error}. It was called with prompts, "
            f"completions, completion_ids and the columns {sorted(rollout.columns)}."
        ) from error
    if isinstance(rewards, Tensor):
        rewards = rewards.tolist()
    if not isinstance(rewards, list | tuple):
        raise RewardError(
            f"The reward function `{name}` returned {type(rewards).__name__}, not a list of numbers."
        )
    if len(rewards) != len(rollout):
        raise RewardError(
            f"The reward function `{name}` returned {len(rewards)} rewards for {len(rollout)} completions. "
            "It must return exactly one for each."
        )
    return [_checked(reward, name, row, rollout) for row, reward in enumerate(rewards)]


def _checked(reward: Any, name: str, row: int, rollout: Rollout) -> float:
    if reward is None:
        return math.nan
    try:
        # float() would read the number in a string, which a function returns by mistake.
        value = math.nan if isinstance(reward, str) else float(reward)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise RewardError(
            f"The reward function `{name}` returned {reward!r} for row {row} of the batch (prompt "
            f"{rollout.prompts[row]!r}, completion {rollout.completions[row]!r}). Return a finite number, or None "
            "where the function does not judge a row."
        )
    return value


def combine_rewards(per_function: Tensor, weights: list[float], rollout: Rollout) -> Tensor:
    """Weighted sum of the functions' rewards over those that judged a row.

    Args:
        per_function: [B, F], NaN where a function does not judge a row.
        weights: F weights.
        rollout: named in the error.

    Returns:
        Scores [B].

    Raises:
        RewardError: no function judged some row.
    """
    unjudged = torch.isnan(per_function).all(dim=1)
    if unjudged.any():
        row = int(unjudged.nonzero()[0])
        raise RewardError(
            f"Every reward function returned None for row {row} of the batch (prompt {rollout.prompts[row]!r}): "
            "at least one must return a number."
        )
    weighted = per_function * torch.tensor(weights, dtype=per_function.dtype, device=per_function.device)
    return weighted.nansum(dim=1)


def token_rewards(
    scores: Tensor,
    kl: Tensor,
    kl_coef: float,
    mask: Tensor,
    gamma: float,
    bootstrap_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-token rewards and discounts of a batch of completions.

    r_t = −kl_coef·KL_t, and at the last token + score (Ziegler et al. 2019, eq. 2; InstructGPT, eq. 2). The
    discount is gamma, and 0 at the last token, after which nothing follows.

    Args:
        scores: [B], paid at each row's last real token.
        kl: [B, T] estimate of KL(policy ‖ reference) at each token.
        kl_coef: coefficient of the penalty.
        mask: [B, T] bool, True on real tokens; a row's tokens stand first.
        gamma: discount a token.
        bootstrap_values: [B], gamma times which is added at the last token: the critic's value of the state
            that a cut completion would have gone on from, 0 for a finished one.

    Returns:
        `rewards` and `discounts`, both [B, T] float32.
    """
    last = mask.sum(dim=1, keepdim=True) - 1
    is_last = torch.arange(mask.shape[1], device=mask.device) == last
    end = scores if bootstrap_values is None else scores + gamma * bootstrap_values
    rewards = torch.where(mask, -kl_coef * kl, 0.0) + torch.where(is_last, end.unsqueeze(1), 0.0)
    discounts = torch.where(is_last, 0.0, gamma).to(rewards.dtype)
    return rewards, discounts


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
