"""Actions that are real numbers: the Gaussian, what the environment is given, and that the same PPO loop learns them."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers.vector import NormalizeReward

from tieback.classic_rl import ppo
from tieback.classic_rl.distributions import Categorical, diagonal_gaussian, environment_actions
from tieback.classic_rl.evaluation import episode_returns
from tieback.classic_rl.networks import GaussianActorCritic, MlpActorCritic, mlp_actor_critic
from tieback.classic_rl.rollout import Collector
from tieback.classic_rl.settings import PPOArguments
from tieback.ppo_core import Batch

CPU = torch.device("cpu")


class Target(VectorEnv):
    """Episodes of one step: the observation is x, the reward −½ |a − (2x, −x)|² of the action as it arrives."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self, num_envs, bound):
        self.num_envs = num_envs
        self.single_observation_space = spaces.Box(-1, 1, (1,), np.float32)
        self.single_action_space = spaces.Box(-bound, bound, (2,), np.float32)
        self.received = []

    def reset(self, *, seed=None, options=None):
        self.rng = np.random.default_rng(seed)
        self.over = np.zeros(self.num_envs, dtype=bool)
        return self._observe(), {}

    def _observe(self):
        self.x = self.rng.uniform(-1, 1, (self.num_envs, 1)).astype(np.float32)
        return self.x

    def step(self, actions):
        self.received.append(actions.copy())
        distance = ((actions - self.x * np.array([2, -1])) ** 2).sum(axis=1)
        rewards = np.where(self.over, 0.0, -distance / 2)
        self.over = ~self.over
        return self._observe(), rewards, self.over, np.zeros(self.num_envs, dtype=bool), {}


def train(policy, env, settings, seed=0):
    optimizer = torch.optim.Adam(policy.parameters(), lr=settings.learning_rate, eps=1e-5)
    collector = Collector(env, seed, CPU)
    return list(ppo.train(policy, optimizer, collector, settings, Accelerator(cpu=True)))


def gaussian(num_features, num_outputs):
    """A policy with means and deviations of all kinds."""
    policy = GaussianActorCritic(num_features, num_outputs)
    with torch.no_grad():
        policy.log_std.copy_(torch.linspace(-1, 0.5, num_outputs))
        policy.actor[-1].weight.normal_(0, 1)
    return policy


def test_log_probabilities_and_entropy_of_the_gaussian_are_those_of_the_formulas():
    torch.manual_seed(0)
    policy = gaussian(3, 2)
    observations = torch.randn(50, 3)
    actions, logprobs, values = policy.act(observations)
    mean, sigma = policy.actor(observations).double(), policy.log_std.double().exp()
    expected = (-(((actions - mean) / sigma) ** 2) / 2 - sigma.log() - math.log(math.sqrt(2 * math.pi))).sum(
        dim=1
    )
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-5, rtol=1e-5)

    column = torch.zeros(50, 1)
    batch = Batch(
        {"observations": observations, "actions": actions}, column, column, column, column, column == 0
    )
    again, values_again, entropy = policy.evaluate(batch)
    assert torch.equal(again, logprobs.unsqueeze(1)), "the ratio before the first step is 1"
    assert torch.equal(values_again, values.unsqueeze(1))
    expected = (0.5 * torch.log(2 * math.pi * math.e * sigma**2)).sum()
    torch.testing.assert_close(entropy.double(), expected.expand(50, 1), atol=1e-6, rtol=1e-6)
    mode, density, _ = policy.act(observations, deterministic=True)
    assert torch.equal(mode, policy.actor(observations))
    assert (density >= logprobs).all()


def test_samples_of_the_gaussian_have_its_mean_and_deviations():
    torch.manual_seed(0)
    mean, log_std = torch.tensor([[1.0, -2.0]]), torch.tensor([-1.0, 0.5])
    samples = diagonal_gaussian(mean.expand(40_000, 2), log_std).sample()
    sigma = log_std.exp()
    assert ((samples.mean(dim=0) - mean[0]).abs() < 4 * sigma / 200).all()
    assert ((samples.std(dim=0) / sigma - 1).abs() < 4 / math.sqrt(2 * 40_000)).all()


def test_the_categorical_agrees_with_that_of_pytorch():
    torch.manual_seed(0)
    logits, actions = 3 * torch.randn(20, 5), torch.randint(5, (20,))
    ours, theirs = Categorical(logits), torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(ours.log_prob(actions), theirs.log_prob(actions), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours.entropy(), theirs.entropy(), atol=1e-6, rtol=1e-6)
    assert torch.equal(ours.mode, theirs.mode)


def test_the_network_follows_the_spaces():
    observations = spaces.Box(-1, 1, (3,))
    assert type(mlp_actor_critic(observations, spaces.Discrete(4))) is MlpActorCritic
    policy = mlp_actor_critic(observations, spaces.Box(-1, 1, (2, 3)))
    assert policy.act(torch.zeros(5, 3))[0].shape == (5, 6)
    with pytest.raises(TypeError, match="MultiBinary"):
        mlp_actor_critic(observations, spaces.MultiBinary(2))
    with pytest.raises(TypeError, match="one dimension"):
        mlp_actor_critic(spaces.Box(-1, 1, (3, 3)), spaces.Discrete(4))


def test_actions_for_the_environment_are_members_of_its_space():
    box = spaces.Box(np.array([[-1, 0, -np.inf]]), np.array([[1, 5, np.inf]]), dtype=np.float64)
    actions = np.array([[-2, -2, -2], [0.5, 6, 9]], dtype=np.float32)
    found = environment_actions(actions, box)
    assert found.tolist() == [[[-1, 0, -2]], [[0.5, 5, 9]]]
    assert all(action in box for action in found)
    assert environment_actions(np.array([0, 2]), spaces.Discrete(3, start=-1)).tolist() == [-1, 1]


def test_the_environment_gets_clipped_actions_and_the_unclipped_ones_are_scored():
    torch.manual_seed(0)
    env = Target(num_envs=6, bound=0.5)
    policy = gaussian(1, 2)
    batch = Collector(env, seed=0, device=CPU).collect(policy, 10, 0.9, 0.95)
    actions = batch.inputs["actions"]
    assert (actions.abs() > 0.5).any()
    received = torch.from_numpy(np.stack(env.received, axis=1))
    assert torch.equal(received, actions.clamp(-0.5, 0.5))
    logprobs, _, _ = policy.evaluate(batch.flatten_time())
    torch.testing.assert_close(logprobs.view(6, 10), batch.old_logprobs, atol=1e-5, rtol=1e-5)


def test_a_restored_collector_plays_real_numbers_again():
    def pendulum():
        return gym.make_vec("Pendulum-v1", num_envs=3, vectorization_mode="sync")

    torch.manual_seed(0)
    policy = gaussian(3, 1)
    kept = Collector(pendulum(), seed=5, device=CPU)
    # Past the end of an episode (200 steps).
    kept.collect(policy, 210, 0.99, 0.95)
    state, random_state = kept.state_dict(), torch.get_rng_state()
    assert state["moves"].dtype == torch.float32
    expected = kept.collect(policy, 40, 0.99, 0.95)
    other = Collector(pendulum(), seed=77, device=CPU)
    other.load_state_dict(state)
    torch.set_rng_state(random_state)
    found = other.collect(policy, 40, 0.99, 0.95)
    assert torch.equal(found.inputs["observations"], expected.inputs["observations"])
    assert torch.equal(found.inputs["actions"], expected.inputs["actions"])
    assert torch.equal(found.returns, expected.returns)


@pytest.mark.slow
def test_it_finds_the_best_actions_and_the_deviation_that_an_entropy_bonus_asks_for():
    """With reward −½|a − a*|² and weight c of the entropy, −½σ² + c·log σ is greatest at σ = √c, around a*(x)."""
    torch.manual_seed(0)
    settings = PPOArguments(
        total_steps=60_000, num_envs=256, num_steps=8, learning_rate=1e-2, ent_coef=0.25, num_ppo_epochs=4,
        num_minibatches=4, whiten_advantages=False,
    )  # fmt: skip
    policy = GaussianActorCritic(1, 2)
    iterations = train(policy, Target(settings.num_envs, bound=100.0), settings)
    x = torch.linspace(-0.9, 0.9, 19).unsqueeze(1)
    with torch.no_grad():
        mean, values = policy(x)
    torch.testing.assert_close(mean, x * torch.tensor([2.0, -1.0]), atol=0.1, rtol=0)
    torch.testing.assert_close(policy.log_std.detach().exp(), torch.full((2,), 0.5), atol=0.05, rtol=0)
    # The critic knows what such a policy earns: −½ (σ² + σ²).
    torch.testing.assert_close(values, torch.full((19,), -0.25), atol=0.05, rtol=0)
    assert iterations[-1].steps >= 60_000
    assert [iteration.last for iteration in iterations] == [False] * (len(iterations) - 1) + [True]


def test_pendulum_is_learnt():
    torch.manual_seed(0)

    def make_env(num_envs):
        return gym.make_vec("Pendulum-v1", num_envs=num_envs, vectorization_mode="sync")

    settings = PPOArguments(
        total_steps=25_000, num_envs=32, num_steps=32, learning_rate=5e-3, gamma=0.9, num_ppo_epochs=10, num_minibatches=4
    )  # fmt: skip
    env = make_env(settings.num_envs)
    policy = mlp_actor_critic(env.single_observation_space, env.single_action_space)

    def act(observations):
        with torch.no_grad():
            actions = policy.act(torch.from_numpy(observations), deterministic=True)[0]
        return environment_actions(actions.numpy(), env.single_action_space)

    before = episode_returns(make_env(40), act, seed=1).mean()
    train(policy, NormalizeReward(env, gamma=settings.gamma), settings)
    after = episode_returns(make_env(40), act, seed=1).mean()
    # To let the pendulum hang earns about −1,200, and it begins anywhere.
    assert before < -1_000
    assert after > -400
