"""Experience replay (Lin 1992; Mnih et al. 2015)."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Transitions(NamedTuple):
    """Steps taken at any time, a row each."""

    observations: Tensor  # [N, features]
    actions: Tensor  # int64 [N]
    rewards: Tensor  # [N]
    next_observations: Tensor  # [N, features]
    terminated: Tensor  # float [N], 1 where nothing follows; a truncated step is not marked


class ReplayBuffer:
    """The last `capacity` transitions, in tensors on the CPU.

    Args:
        capacity: transitions kept; older ones are overwritten.
        num_features: size of an observation.
    """

    def __init__(self, capacity: int, num_features: int) -> None:
        self._store = Transitions(
            torch.zeros(capacity, num_features),
            torch.zeros(capacity, dtype=torch.int64),
            torch.zeros(capacity),
            torch.zeros(capacity, num_features),
            torch.zeros(capacity),
        )
        self._capacity = capacity
        self._next = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(
        self,
        observations: np.ndarray,
        actions: np.ndarray,
        rewards: np.ndarray,
        next_observations: np.ndarray,
        terminated: np.ndarray,
    ) -> None:
        """Append transitions, `[N, ...]` each, in order."""
        rows = (self._next + torch.arange(len(actions))) % self._capacity
        new = (observations, actions, rewards, next_observations, terminated)
        for kept, values in zip(self._store, new, strict=True):
            kept[rows] = torch.as_tensor(values, dtype=kept.dtype)
        self._next = (self._next + len(actions)) % self._capacity
        self._size = min(self._size + len(actions), self._capacity)

    def sample(self, size: int, generator: torch.Generator) -> Transitions:
        """Draw `size` transitions uniformly, with replacement."""
        rows = torch.randint(self._size, (size,), generator=generator)
        return Transitions(*(kept[rows] for kept in self._store))
