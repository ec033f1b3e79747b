"""Replay, Double DQN's targets, epsilon, and that it learns a task whose Q is known."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import nn

from tieback.classic_rl.dqn import DQNArguments, epsilon_at, td_targets, train
from tieback.classic_rl.networks import q_network
from tieback.classic_rl.replay import ReplayBuffer, Transitions
from tieback.cli.errors import UsageError


def numbered(first, count):
    """Transitions that carry their number in every field."""
    numbers = np.arange(first, first + count)
    wide = np.stack([numbers, -numbers], axis=1).astype(np.float32)
    return wide, numbers % 2, numbers.astype(np.float32), wide + 0.5, numbers % 3 == 0


def test_the_buffer_keeps_the_newest_and_whole_rows():
    buffer = ReplayBuffer(capacity=5, num_features=2)
    buffer.add(*numbered(0, 3))
    assert len(buffer) == 3
    buffer.add(*numbered(3, 4))
    assert len(buffer) == 5
    batch = buffer.sample(500, torch.Generator().manual_seed(0))
    numbers = batch.rewards
    assert set(numbers.tolist()) == {2, 3, 4, 5, 6}
    assert torch.equal(batch.observations, torch.stack([numbers, -numbers], dim=1))
    assert torch.equal(batch.next_observations, batch.observations + 0.5)
    assert torch.equal(batch.actions, numbers.long() % 2)
    assert torch.equal(batch.terminated, (numbers.long() % 3 == 0).float())


def test_samples_are_uniform_over_what_was_added():
    buffer = ReplayBuffer(capacity=100, num_features=2)
    buffer.add(*numbered(0, 4))
    counts = torch.bincount(
        buffer.sample(40_000, torch.Generator().manual_seed(1)).rewards.long(), minlength=4
    )
    # Three standard deviations of a binomial count.
    assert (counts - 10_000).abs().max() < 3 * (40_000 * 0.25 * 0.75) ** 0.5


class Table(nn.Module):
    """Q by the number that an observation is."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(torch.tensor(table))

    def forward(self, observations):
        return self.table[observations[:, 0].long()]


def test_the_online_network_chooses_and_the_target_network_values():
    online, target = Table([[1.0, 2.0], [5.0, 4.0]]), Table([[10.0, 20.0], [30.0, 40.0]])
    batch = Transitions(
        observations=torch.zeros(3, 1),
        actions=torch.zeros(3, dtype=torch.int64),
        rewards=torch.tensor([1.0, 1.0, 1.0]),
        next_observations=torch.tensor([[0.0], [1.0], [1.0]]),
        terminated=torch.tensor([0.0, 0.0, 1.0]),
    )
    # Plain DQN would take the target's own maximum, 40, in state 1.
    targets = td_targets(batch, online, target, gamma=0.9)
    assert targets.tolist() == pytest.approx([1 + 0.9 * 20, 1 + 0.9 * 30, 1.0])
    assert not targets.requires_grad


def test_epsilon_falls_linearly_and_stays():
    settings = DQNArguments(epsilon_start=0.8, epsilon_end=0.2, epsilon_decay_steps=100)
    assert [epsilon_at(step, settings) for step in (0, 50, 100, 10_000)] == pytest.approx(
        [0.8, 0.5, 0.2, 0.2]
    )


def test_the_default_network_has_770_parameters():
    assert sum(parameter.numel() for parameter in q_network((2.4, 2.0, 0.2, 2.0), 2).parameters()) == 770


class Corridor(VectorEnv):
    """Two states in a row. Action 1 goes on, action 0 ends it with 0.3; going on from the second is worth 1.

    Every third episode of a sub-environment is truncated after its first step.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self, num_envs):
        self.num_envs = num_envs
        self.single_observation_space = spaces.Box(0, 1, (2,), np.float32)
        self.single_action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        self.place = np.zeros(self.num_envs, dtype=int)
        self.over = np.zeros(self.num_envs, dtype=bool)
        self.episode = np.arange(self.num_envs)
        return np.eye(2, dtype=np.float32)[self.place], {}

    def step(self, actions):
        resets, stops = self.over, actions == 0
        second = self.place == 1
        # The reward and the end of a reset step are wrong on purpose: nothing may be learnt from them.
        rewards = np.where(resets, 50.0, np.where(stops, 0.3, np.where(second, 1.0, 0.0)))
        terminated = ~resets & (stops | second)
        truncated = ~resets & ~terminated & (self.episode % 3 == 0)
        self.place = np.where(resets, 0, np.where(stops, self.place, 1))
        self.episode = self.episode + resets
        self.over = terminated | truncated
        return np.eye(2, dtype=np.float32)[self.place], rewards, terminated, truncated, {}


@pytest.mark.slow
def test_it_learns_the_values_of_a_corridor_with_truncated_episodes():
    torch.manual_seed(0)
    network = q_network((1.0, 1.0), 2)
    settings = DQNArguments(
        total_steps=12_000, num_envs=4, learning_starts=100, batch_size=64, learning_rate=3e-3, gamma=0.9,
        epsilon_end=0.5, target_tau=0.05, eval_every=4_000,
    )  # fmt: skip
    reports = list(train(network, Corridor(4), settings, seed=0))
    assert [report.env_steps for report in reports] == [4_000, 8_000, 12_000]
    # Q(first, on) = 0.9: were truncation taken for the end it would be 0.6, and with the reset steps far more.
    expected = torch.tensor([[0.3, 0.9], [0.3, 1.0]])
    torch.testing.assert_close(network(torch.eye(2)), expected, atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"epsilon_end": 1.5}, "epsilon_end 1.5"),
        ({"epsilon_start": 0.1, "epsilon_end": 0.2}, "the start not below the end"),
        ({"target_tau": 0.0}, "target_tau"),
    ],
)
def test_settings_out_of_range_are_refused(flags, message):
    with pytest.raises(UsageError, match=message):
        DQNArguments(**flags)
