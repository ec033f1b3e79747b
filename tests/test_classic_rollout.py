"""The collector: what a vector environment does becomes the right batch, and a resume stands where it stood."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import nn

from tieback.classic_rl.networks import ActorCritic
from tieback.classic_rl.rollout import Collector

CPU = torch.device("cpu")
# What becomes of each sub-environment: rewards of its episode's steps, and how the episode ends.
EPISODES = ((3, "terminated"), (2, "truncated"))


class Scripted(VectorEnv):
    """Observations count up and never repeat; rewards are 10 + step; episodes end by script, resets take a step."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self):
        self.num_envs = len(EPISODES)
        self.single_action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        self.shown = np.full(self.num_envs, float(seed))
        self.step_in_episode = np.zeros(self.num_envs, dtype=int)
        self.over = np.zeros(self.num_envs, dtype=bool)
        return self._observe(), {}

    def step(self, actions):
        self.shown += 1
        rewards = np.where(self.over, 0.0, 10.0 + self.step_in_episode)
        self.step_in_episode = np.where(self.over, 0, self.step_in_episode + 1)
        ended = np.array(
            [step == length for step, (length, _) in zip(self.step_in_episode, EPISODES, strict=True)]
        )
        ended &= ~self.over
        by = np.array([kind for _, kind in EPISODES])
        self.over = ended
        return self._observe(), rewards, ended & (by == "terminated"), ended & (by == "truncated"), {}

    def _observe(self):
        # The same memory each time, as some environments do.
        if not hasattr(self, "memory"):
            self.memory = np.zeros((self.num_envs, 1), dtype=np.float32)
        self.memory[:, 0] = self.shown
        return self.memory


class Counting(ActorCritic):
    """V(s) = s / 10; two actions, of which the second is certain."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, observations):
        logits = torch.tensor([-1e9, 0.0]).expand(len(observations), 2)
        return logits, observations[:, 0] / 10


def test_a_rollout_by_hand():
    gamma, lam = 0.9, 0.5
    batch = Collector(Scripted(), seed=0, device=CPU).collect(Counting(), 5, gamma, lam)
    assert batch.inputs["observations"][..., 0].tolist() == [[0, 1, 2, 3, 4]] * 2
    assert batch.inputs["actions"].tolist() == [[1] * 5] * 2
    assert batch.mask.tolist() == [[True, True, True, False, True], [True, True, False, True, True]]
    values = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]

    # Row 0: three steps and a terminated end; the reset step; the first step of the next episode, cut by the rollout.
    last = 12 - values[2]
    second = 11 + gamma * values[2] - values[1] + gamma * lam * last
    first = 10 + gamma * values[1] - values[0] + gamma * lam * second
    again = 10 + gamma * values[5] - values[4]
    torch.testing.assert_close(batch.advantages[0], torch.tensor([first, second, last, 0.0, again]))

    # Row 1: two steps and a truncated end, worth its last observation's value; the reset; two steps that end so again.
    end = 11 + gamma * values[2] - values[1]
    start = 10 + gamma * values[1] - values[0] + gamma * lam * end
    end_again = 11 + gamma * values[5] - values[4]
    start_again = 10 + gamma * values[4] - values[3] + gamma * lam * end_again
    torch.testing.assert_close(batch.advantages[1], torch.tensor([start, end, 0.0, start_again, end_again]))
    torch.testing.assert_close(batch.returns[batch.mask], (batch.advantages + batch.old_values)[batch.mask])


def test_rollouts_follow_on_from_each_other():
    long = Collector(Scripted(), seed=0, device=CPU)
    short = Collector(Scripted(), seed=0, device=CPU)
    whole = long.collect(Counting(), 6, 0.9, 0.95)
    parts = [short.collect(Counting(), 3, 0.9, 0.95) for _ in range(2)]
    for name in ("observations", "actions"):
        assert torch.equal(torch.cat([part.inputs[name] for part in parts], dim=1), whole.inputs[name])
    assert torch.equal(torch.cat([part.mask for part in parts], dim=1), whole.mask)


def test_returns_of_episodes_are_undiscounted_and_leave_the_reset_step_out():
    collector = Collector(Scripted(), seed=0, device=CPU)
    collector.collect(Counting(), 8, 0.9, 0.95)
    assert collector.num_episodes == 5
    assert sorted(collector.recent_returns) == [21, 21, 21, 33, 33]


def test_another_way_of_resetting_is_refused():
    env = gym.make_vec("CartPole-v1", num_envs=2, vectorization_mode="sync",
                       vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP})  # fmt: skip
    with pytest.raises(ValueError, match="resets in the step after"):
        Collector(env, seed=0, device=CPU)


def test_actions_of_another_kind_are_refused():
    env = Scripted()
    env.single_action_space = spaces.MultiBinary(2)
    with pytest.raises(TypeError, match="MultiBinary"):
        Collector(env, seed=0, device=CPU)


def test_a_restored_collector_goes_on_with_the_same_batches():
    def cartpole():
        return gym.make_vec("CartPole-v1", num_envs=3, vectorization_mode="vector_entry_point")

    class Policy(Counting):
        def forward(self, observations):
            return torch.stack([observations[:, 2], -observations[:, 2]], dim=1), observations[:, 0]

    torch.manual_seed(0)
    kept = Collector(cartpole(), seed=5, device=CPU)
    for _ in range(3):
        kept.collect(Policy(), 40, 0.99, 0.95)
    state, random_state = kept.state_dict(), torch.get_rng_state()
    expected = kept.collect(Policy(), 40, 0.99, 0.95)

    other = Collector(cartpole(), seed=77, device=CPU)
    other.load_state_dict(state)
    torch.set_rng_state(random_state)
    found = other.collect(Policy(), 40, 0.99, 0.95)
    for name in ("old_logprobs", "old_values", "advantages", "returns", "mask"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert torch.equal(found.inputs["observations"], expected.inputs["observations"])
    assert other.num_episodes == kept.num_episodes
    assert other.recent_returns == kept.recent_returns
