"""The first iterations, in which only the critic learns: a number of them, or until it no longer becomes better."""

import math
from typing import Any

# A rise of the explained variance by less is chance.
LEAST_RISE = 0.01


class CriticWarmup:
    """Whether the policy still waits for the critic (Yuan et al. 2025, "What's Behind PPO's Collapse in Long-CoT?", VC-PPO).

    Args:
        iterations: most iterations of the warm-up.
        patience: iterations without a rise of the explained variance after which it ends; None to use all.
    """

    def __init__(self, iterations: int, patience: int | None) -> None:
        self.iterations = iterations
        self.patience = patience
        self.best = -math.inf
        self.without_rise = 0

    def active(self, iteration: int) -> bool:
        """Whether the iteration, counted from 0, is one of the critic alone."""
        return iteration < self.iterations and not self.ended

    @property
    def ended(self) -> bool:
        """Whether it has ended for want of a rise; it does not begin again."""
        return self.patience is not None and self.without_rise >= self.patience

    def update(self, explained_variance: float) -> None:
        """Take in the explained variance of an iteration's returns by the critic before it learnt from them."""
        if self.ended:
            return
        if explained_variance > self.best + LEAST_RISE:
            self.best, self.without_rise = explained_variance, 0
        else:
            self.without_rise += 1

    def state_dict(self) -> dict[str, Any]:
        """State as JSON."""
        return {"best": None if self.best == -math.inf else self.best, "without_rise": self.without_rise}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.best = -math.inf if state["best"] is None else float(state["best"])
        self.without_rise = int(state["without_rise"])
