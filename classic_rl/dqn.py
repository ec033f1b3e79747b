"""Double DQN (van Hasselt et al. 2016) for a vector environment with observations of a few numbers.

Q(s, a) is a network. It learns from transitions drawn from a replay buffer (Mnih et al. 2015), towards

    y = r + γ (1 − terminated) Q_target(s', argmax_a' Q(s', a'))

The online network chooses the next action and the target network, a copy that follows slowly, says what it is worth:
a maximum over one noisy estimate would be too high. A truncated episode has a future, so only `terminated` cuts it.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor, nn

from tieback.classic_rl.replay import ReplayBuffer, Transitions
from tieback.classic_rl.settings import require_positive
from tieback.cli.errors import UsageError


@dataclass
class DQNArguments:
    """Settings of Double DQN."""

    total_steps: int = field(
        default=200_000, metadata={"help": "Steps of the environments together, at most."}
    )
    num_envs: int = field(default=8, metadata={"help": "Environments that are stepped together."})
    buffer_size: int = field(default=100_000, metadata={"help": "Transitions that the replay buffer keeps."})
    learning_starts: int = field(default=1_000, metadata={"help": "Steps before the first update."})
    updates_per_step: int = field(
        default=2, metadata={"help": "Updates after each step of all environments together."}
    )
    batch_size: int = field(default=256, metadata={"help": "Transitions of an update."})
    learning_rate: float = field(
        default=2e-3, metadata={"help": "Learning rate of Adam; it falls to 0 linearly."}
    )
    gamma: float = field(default=0.98, metadata={"help": "Discount."})
    epsilon_start: float = field(default=1.0, metadata={"help": "Probability of a random action at first."})
    epsilon_end: float = field(
        default=0.05, metadata={"help": "Probability of a random action after the decay."}
    )
    epsilon_decay_steps: int = field(default=10_000, metadata={"help": "Steps of the linear decay."})
    target_tau: float = field(
        default=0.005, metadata={"help": "Share of the online network that enters the target at each update."}
    )
    max_grad_norm: float = field(default=100.0, metadata={"help": "Bound on the norm of the gradient."})
    eval_every: int = field(default=2_000, metadata={"help": "Steps between evaluations."})

    def __post_init__(self) -> None:
        require_positive(
            self, "total_steps", "num_envs", "buffer_size", "updates_per_step", "batch_size", "eval_every"
        )
        if not 0 <= self.epsilon_end <= self.epsilon_start <= 1:
            raise UsageError(
                f"epsilon_start {self.epsilon_start} and epsilon_end {self.epsilon_end} must be between 0 and 1, "
                "the start not below the end."
            )
        if not 0 < self.target_tau <= 1:
            raise UsageError(f"target_tau must be above 0 and at most 1, but is {self.target_tau}.")


class Progress(NamedTuple):
    """Where training stands."""

    env_steps: int
    epsilon: float
    loss: float


def td_targets(batch: Transitions, online: nn.Module, target: nn.Module, gamma: float) -> Tensor:
    """Double DQN's targets y, `[N]`."""
    with torch.no_grad():
        best = online(batch.next_observations).argmax(dim=1, keepdim=True)
        future = target(batch.next_observations).gather(1, best).squeeze(1)
        return batch.rewards + gamma * (1 - batch.terminated) * future


def epsilon_at(step: int, settings: DQNArguments) -> float:
    """Epsilon after `step` steps of the environments: linear from start to end, then constant."""
    share = min(step / max(settings.epsilon_decay_steps, 1), 1.0)
    return settings.epsilon_start + share * (settings.epsilon_end - settings.epsilon_start)


def train(online: nn.Module, env: VectorEnv, settings: DQNArguments, seed: int) -> Iterator[Progress]:
    """Train a Q-network in place, and hand over control every `eval_every` steps.

    Args:
        online: the network, observations `[N, features]` → Q `[N, actions]`.
        env: resets in the step after an episode's end (that step is no transition, and is left out).
        settings: of the algorithm.
        seed: of exploration and replay.
    """
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    target = copy.deepcopy(online)
    optimizer = torch.optim.Adam(online.parameters(), lr=settings.learning_rate, fused=True)
    num_iterations = -(-settings.total_steps // env.num_envs)
    schedule = torch.optim.lr_scheduler.LinearLR(
        optimizer, 1.0, 0.0, num_iterations * settings.updates_per_step
    )
    features = env.single_observation_space.shape
    assert features is not None
    replay = ReplayBuffer(settings.buffer_size, features[0])
    num_actions = int(env.single_action_space.n)  # type: ignore[attr-defined]

    observations, _ = env.reset(seed=seed)
    resetting = np.zeros(env.num_envs, dtype=bool)
    next_report, loss = settings.eval_every, torch.zeros(())
    for iteration in range(num_iterations):
        steps = iteration * env.num_envs
        with torch.no_grad():
            actions = online(torch.from_numpy(observations)).argmax(dim=1).numpy()
        explores = rng.random(env.num_envs) < epsilon_at(steps, settings)
        actions[explores] = rng.integers(num_actions, size=int(explores.sum()))
        following, rewards, terminated, truncated, _ = env.step(actions)
        real = ~resetting
        replay.add(observations[real], actions[real], rewards[real], following[real], terminated[real])
        observations, resetting = following.copy(), terminated | truncated

        steps += env.num_envs
        if steps >= settings.learning_starts:
            for _ in range(settings.updates_per_step):
                batch = replay.sample(settings.batch_size, generator)
                chosen = online(batch.observations).gather(1, batch.actions.unsqueeze(1)).squeeze(1)
                loss = nn.functional.mse_loss(chosen, td_targets(batch, online, target, settings.gamma))
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(online.parameters(), settings.max_grad_norm)
                optimizer.step()
                schedule.step()
                with torch.no_grad():
                    torch._foreach_lerp_(
                        list(target.parameters()), list(online.parameters()), settings.target_tau
                    )
        if steps >= next_report or iteration == num_iterations - 1:
            next_report += settings.eval_every
            yield Progress(steps, epsilon_at(steps, settings), loss.item())
