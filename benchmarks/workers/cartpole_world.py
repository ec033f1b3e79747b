"""CartPole until it is learnt: how both are judged."""

import time
from collections.abc import Callable

import gymnasium
import numpy as np
import torch
from protocol import Turns
from torch import Tensor

ENVIRONMENT = "CartPole-v1"
LEARNT = 490.0
EVAL_EVERY = 2_000
TOTAL_STEPS = 200_000
_EPISODES = 100
# Of environments that no training sees.
_SEED = 1_000_000


class UntilLearnt:
    """One turn: the CPU seconds of a training, without those of its evaluations, until a greedy mean return of 490."""

    def __init__(self) -> None:
        self._env = gymnasium.make_vec(
            ENVIRONMENT, num_envs=_EPISODES, vectorization_mode="vector_entry_point"
        )
        self._turns = Turns()
        self._turns.wait()
        self._began = time.process_time()
        self._evaluating = 0.0

    def evaluate(self, q_values: Callable[[Tensor], Tensor]) -> bool:
        """Whether the policy that is greedy in Q, observations `[N, 4]` → `[N, 2]`, has learnt the task."""
        began = time.process_time()
        observations, _ = self._env.reset(seed=_SEED)
        returns, running = np.zeros(_EPISODES), np.ones(_EPISODES, dtype=bool)
        while running.any():
            with torch.no_grad():
                actions = q_values(torch.from_numpy(observations)).argmax(dim=1).numpy()
            observations, rewards, terminated, truncated, _ = self._env.step(actions)
            returns[running] += rewards[running]
            running &= ~(terminated | truncated)
        self._evaluating += time.process_time() - began
        return float(returns.mean()) >= LEARNT

    def done(self, steps: int, learnt: bool) -> None:
        """Tell what it took, and leave when there is nothing more to do."""
        cpu = time.process_time() - self._began - self._evaluating
        self._turns.done(cpu=cpu, steps=steps, learnt=float(learnt))
        self._turns.wait()
