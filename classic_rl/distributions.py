"""Distributions over the actions of an environment: one of a few (Discrete), or real numbers (Box)."""

import numpy as np
import torch
from gymnasium import Space
from gymnasium.spaces import Box, Discrete
from torch import Tensor
from torch.distributions import Independent, Normal

from tieback import ppo_core


class Categorical:
    """Probabilities softmax(logits) of the actions 0, 1, …; used like a distribution of `torch.distributions`.

    Args:
        logits: `[N, actions]`, of any float type; computed with in float32.
    """

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits.float()
        self._logprobs = torch.log_softmax(self._logits, dim=-1)

    @property
    def mode(self) -> Tensor:
        """The likeliest actions, int64 `[N]`."""
        return self._logprobs.argmax(dim=-1)

    def sample(self) -> Tensor:
        """Random actions, int64 `[N]`."""
        return torch.multinomial(self._logprobs.exp(), 1).squeeze(1)

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log-probabilities `[N]` of actions `[N]`."""
        return self._logprobs.gather(1, actions.unsqueeze(1)).squeeze(1)

    def entropy(self) -> Tensor:
        """Entropies `[N]`, in nats."""
        return ppo_core.entropy(self._logits)


def diagonal_gaussian(mean: Tensor, log_std: Tensor) -> Independent:
    """Normal distributions of independent components.

    Its actions are unbounded: log-probabilities are of what was sampled, and `environment_actions` clips only what the
    environment is given.

    Args:
        mean: `[N, D]`, of any float type; computed with in float32.
        log_std: `[D]`, logarithms of the standard deviations, the same in every state.

    Returns:
        A distribution whose log-probabilities and entropies `[N]` are sums over the D components.
    """
    return Independent(Normal(mean.float(), log_std.exp().expand(mean.shape)), 1)


Distribution = Categorical | Independent


def environment_actions(actions: np.ndarray, space: Space) -> np.ndarray:
    """Turn actions of a policy into those that an environment is given.

    Args:
        actions: int64 `[N]` from 0 for a `Discrete` space, float `[N, D]` without bounds for a `Box`.
        space: actions of one environment.

    Returns:
        Members of `space`, `[N, ...]`: counted from its start, or clipped to its bounds.
    """
    if isinstance(space, Discrete):
        return actions + space.start
    assert isinstance(space, Box)
    return np.clip(actions.reshape(-1, *space.shape), space.low, space.high).astype(space.dtype)
