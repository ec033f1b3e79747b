"""Rollouts from a vector environment, as a `Batch` for `ppo_core.update`."""

from collections import deque
from typing import Any

import numpy as np
import torch
from gymnasium import Space
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

from tieback import ppo_core
from tieback.classic_rl.distributions import environment_actions
from tieback.classic_rl.networks import ActorCritic
from tieback.ppo_core import Batch


class Collector:
    """Steps a vector environment on and on, and keeps what lies between one rollout and the next.

    The environment must reset in the step after an episode's end (Gymnasium's `AutoresetMode.NEXT_STEP`): in that step
    the action is not looked at, so it is masked; and the observation before it is the episode's true last one.

    Args:
        env: the environment, deterministic given its seed and the actions; its actions are `Discrete` or a `Box`.
        seed: of the environments.
        device: where the policy is.

    Attributes:
        recent_returns: undiscounted returns of the last 100 finished episodes.
        num_episodes: finished episodes.
    """

    def __init__(self, env: VectorEnv, seed: int, device: torch.device) -> None:
        if env.metadata.get("autoreset_mode") != AutoresetMode.NEXT_STEP:
            raise ValueError("Collector needs an environment that resets in the step after an episode's end.")
        if not isinstance(env.single_action_space, Discrete | Box):
            raise TypeError(f"Actions must be Discrete or a Box, but are {env.single_action_space}.")
        self.env, self.device = env, device
        self._move_dtype = _move_dtype(env.single_action_space)
        self.recent_returns: deque[float] = deque(maxlen=100)
        self.num_episodes = 0
        self.restart(seed)

    def restart(self, seed: int) -> None:
        """Begin new episodes everywhere, and a new record of the moves."""
        self._seed = seed
        self._moves: list[np.ndarray] = []
        self._observations: Any = self.env.reset(seed=seed)[0].copy()
        self._returns = np.zeros(self.env.num_envs)
        self._resetting = np.zeros(self.env.num_envs, dtype=bool)

    def collect(self, policy: ActorCritic, num_steps: int, gamma: float, gae_lambda: float) -> Batch:
        """Act for `num_steps` in every environment, by sampling.

        A truncated episode is bootstrapped: γ·V of its last observation is added to the last reward, and the discount
        is 0 there as at the end of a terminated one.

        Returns:
            A batch `[environments, num_steps]` on the CPU with the inputs `observations` and `actions`. The actions are
            the policy's: those of a Gaussian are clipped to the bounds of the space only for the environment.
        """
        columns: list[tuple[Tensor, ...]] = []
        for _ in range(num_steps):
            observations = torch.from_numpy(self._observations)
            with torch.no_grad():
                actions, logprobs, values = policy.act(observations.to(self.device))
            mask = torch.from_numpy(~self._resetting)
            rewards, terminated, truncated = self._step(actions.cpu().numpy())
            columns.append(
                (
                    observations,
                    actions.cpu(),
                    logprobs.cpu(),
                    values.cpu(),
                    mask,
                    rewards,
                    terminated,
                    truncated,
                )
            )
        with torch.no_grad():
            bootstrap = policy.act(torch.from_numpy(self._observations).to(self.device))[2].cpu()
        observations, actions, logprobs, values, mask, rewards, terminated, truncated = (
            torch.stack(column, dim=1) for column in zip(*columns, strict=True)
        )
        values = torch.cat([values, bootstrap.unsqueeze(1)], dim=1)
        rewards = torch.where(truncated, rewards + gamma * values[:, 1:], rewards)
        discounts = torch.where(terminated | truncated, 0.0, gamma)
        advantages = ppo_core.gae(rewards, discounts, values, gae_lambda, mask)
        return Batch(
            inputs={"observations": observations, "actions": actions},
            old_logprobs=logprobs,
            old_values=values[:, :-1],
            advantages=advantages,
            returns=advantages + values[:, :-1],
            mask=mask,
        )

    def _step(self, actions: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        self._moves.append(actions.astype(self._move_dtype))
        actions = environment_actions(actions, self.env.single_action_space)
        # Environments may hand out the same memory again: what is kept must be a copy.
        observations, rewards, terminated, truncated, _ = self.env.step(actions)
        self._observations = observations.copy()
        self._returns[self._resetting] = 0.0
        self._returns += rewards
        self._resetting = terminated | truncated
        self.recent_returns.extend(self._returns[self._resetting].tolist())
        self.num_episodes += int(self._resetting.sum())
        return (
            torch.as_tensor(rewards, dtype=torch.float32),
            torch.as_tensor(terminated, dtype=torch.bool),
            torch.as_tensor(truncated, dtype=torch.bool),
        )

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to stand where this one stands: seed and moves since the last restart."""
        moves = (
            np.stack(self._moves) if self._moves else np.zeros((0, self.env.num_envs), dtype=self._move_dtype)
        )
        return {
            "seed": self._seed,
            "moves": torch.from_numpy(moves),
            "recent_returns": list(self.recent_returns),
            "num_episodes": self.num_episodes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Play the recorded moves again, which brings the environments to the very same frames."""
        self.restart(state["seed"])
        for actions in state["moves"].numpy():
            # A policy's actions: int64 or float32.
            self._step(actions if actions.dtype.kind == "f" else actions.astype(np.int64))
        self.recent_returns = deque(state["recent_returns"], maxlen=100)
        self.num_episodes = state["num_episodes"]


def _move_dtype(space: Space) -> type[np.generic]:
    """The smallest type that holds a policy's actions in `space` exactly."""
    if isinstance(space, Discrete):
        return np.uint8 if space.n <= 256 else np.int64
    return np.float32
