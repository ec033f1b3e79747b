"""CartPole by Double DQN, or by the PPO core that also tunes language models.

    python -m classic_rl.cartpole
    python -m classic_rl.cartpole --algorithm ppo --seed 1

Balance a pole on a cart by pushing left or right; the return is the number of steps it stands, 500 at most. Training
ends when a greedy evaluation is perfect, or after `total_steps`; the policy that is kept is the best by evaluation.
It leaves out resuming: training takes a minute.
"""

import argparse
import contextlib
import copy
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from accelerate import Accelerator
from gymnasium.vector import VectorEnv
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from tieback.classic_rl import dqn, ppo
from tieback.classic_rl.evaluation import Act, episode_returns, film_episode, write_video
from tieback.classic_rl.networks import ActorCritic, mlp_actor_critic, q_network
from tieback.classic_rl.rollout import Collector
from tieback.classic_rl.settings import PPOArguments, new_default, require_positive
from tieback.classic_rl.tracking import tracking_accelerator
from tieback.classic_rl.weights import save_weights
from tieback.cli.arguments import parse_flags
from tieback.cli.errors import run
from tieback.cli.results import print_metrics, write_json, write_metrics

ENVIRONMENT_ID = "CartPole-v1"
MAX_RETURN = 500.0
NUM_ACTIONS = 2
# Cart position (its bound), cart velocity, pole angle (its bound), pole angular velocity.
MAGNITUDES = (2.4, 2.0, 0.2, 2.0)
NUM_EVAL_EPISODES = 100
# Seeds of the environments that choose the best policy, and of those that then judge it.
_SELECTION_SEED, _FINAL_SEED = 1_000_000, 2_000_000


@dataclass
class CartPoleArguments:
    """What to run, and where to write."""

    algorithm: str = field(
        default="dqn", metadata={"help": "Algorithm to learn by.", "choices": ["dqn", "ppo"]}
    )
    seed: int = field(default=0, metadata={"help": "Seed of everything random."})
    output_dir: str = field(
        default="", metadata={"help": "Folder to write into; runs/cartpole/<algorithm> when not given."}
    )
    report_to: str = field(
        default="tensorboard",
        metadata={
            "help": "Tracker that figures are logged to.",
            "choices": ["tensorboard", "wandb", "trackio", "none"],
        },
    )

    def __post_init__(self) -> None:
        self.output_dir = self.output_dir or f"runs/cartpole/{self.algorithm}"


@dataclass
class CartPolePPOArguments(PPOArguments):
    """Settings of PPO on CartPole."""

    total_steps: int = new_default(PPOArguments, "total_steps", 300_000)
    learning_rate: float = new_default(PPOArguments, "learning_rate", 2e-3)
    gae_lambda: float = new_default(PPOArguments, "gae_lambda", 0.9)
    num_ppo_epochs: int = new_default(PPOArguments, "num_ppo_epochs", 8)
    num_minibatches: int = new_default(PPOArguments, "num_minibatches", 4)
    eval_every: int = field(default=8_192, metadata={"help": "Steps between evaluations."})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "eval_every")


def make_env(num_envs: int) -> VectorEnv:
    """CartPole-v1, many at once, in NumPy."""
    return gym.make_vec(ENVIRONMENT_ID, num_envs=num_envs, vectorization_mode="vector_entry_point")


def greedy(network: nn.Module) -> Act:
    """Act by the highest output: Q of a Q-network, or the logits of an actor-critic."""

    def act(observations: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            outputs = network(torch.from_numpy(observations))
        scores = outputs[0] if isinstance(outputs, tuple) else outputs
        return scores.argmax(dim=1).numpy()

    return act


def train_dqn(
    network: nn.Module, settings: dqn.DQNArguments, seed: int, accelerator: Accelerator
) -> Iterator[int]:
    """Train by Double DQN in place; yields the steps so far whenever an evaluation is due."""
    started = time.perf_counter()
    for progress in dqn.train(network, make_env(settings.num_envs), settings, seed):
        figures = {
            "train/epsilon": progress.epsilon,
            "value/loss": progress.loss,
            "train/steps_per_second": progress.env_steps / (time.perf_counter() - started),
        }
        accelerator.log(figures, progress.env_steps)
        yield progress.env_steps


def train_ppo(
    network: ActorCritic, settings: CartPolePPOArguments, seed: int, accelerator: Accelerator
) -> Iterator[int]:
    """Train by PPO in place; yields the steps so far whenever an evaluation is due."""
    optimizer = torch.optim.Adam(network.parameters(), lr=settings.learning_rate, eps=1e-5)
    collector = Collector(make_env(settings.num_envs), seed, accelerator.device)
    next_evaluation = settings.eval_every
    for iteration in ppo.train(network, optimizer, collector, settings, accelerator):
        if iteration.steps >= next_evaluation or iteration.last:
            next_evaluation += settings.eval_every
            yield iteration.steps


def train_to_the_best(
    network: nn.Module,
    evaluations: Iterator[int],
    total_steps: int,
    folder: Path,
    accelerator: Accelerator,
) -> tuple[dict[str, Tensor], int]:
    """Follow a training, evaluate when it is due, and keep the best policy, on disk too.

    Args:
        network: that is trained.
        evaluations: trains it on; yields the steps so far when an evaluation is due.
        total_steps: of the training.
        folder: to write into.
        accelerator: what logs.

    Returns:
        The best policy's weights, and the steps that were trained.
    """
    best_return, best = -np.inf, copy.deepcopy(network.state_dict())
    env, steps = make_env(NUM_EVAL_EPISODES), 0
    columns = (
        TextColumn("{task.completed:>9,.0f}/{task.total:,.0f} steps"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("", total=total_steps)
        started = time.perf_counter()
        for steps in evaluations:
            mean_return = float(episode_returns(env, greedy(network), _SELECTION_SEED).mean())
            rate = steps / (time.perf_counter() - started)
            accelerator.log({"eval/mean_return": mean_return}, steps)
            if mean_return > best_return:
                best_return, best = mean_return, copy.deepcopy(network.state_dict())
                save_weights(folder / "policy.safetensors", best)
            text = f"{rate:,.0f} steps/s  return {mean_return:.0f}  best {best_return:.0f}"
            bar.update(task, completed=min(steps, total_steps), description=text)
            if mean_return >= MAX_RETURN:
                break
    return best, steps


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread: the networks are too small for more to help."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def main(arguments: CartPoleArguments, settings: dqn.DQNArguments | CartPolePPOArguments) -> None:
    """Train, evaluate, draw and film."""
    torch.manual_seed(arguments.seed)
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = tracking_accelerator(arguments.report_to, folder, use_cpu=True)
    write_json(folder / "settings.json", {**asdict(arguments), **asdict(settings)})

    started = time.perf_counter()
    network: nn.Module
    if isinstance(settings, dqn.DQNArguments):
        network = q_network(MAGNITUDES, NUM_ACTIONS)
        evaluations = train_dqn(network, settings, arguments.seed, accelerator)
    else:
        sample = make_env(1)
        network = actor_critic = mlp_actor_critic(sample.single_observation_space, sample.single_action_space)
        evaluations = train_ppo(actor_critic, settings, arguments.seed, accelerator)
    best, steps = train_to_the_best(network, evaluations, settings.total_steps, folder, accelerator)
    seconds = time.perf_counter() - started

    network.load_state_dict(best)
    returns = episode_returns(make_env(NUM_EVAL_EPISODES), greedy(network), _FINAL_SEED)
    metrics = {
        "eval/mean_return": float(returns.mean()),
        "eval/min_return": float(returns.min()),
        "train/env_steps": float(steps),
        "train/seconds": seconds,
    }
    # matplotlib takes half a second, which --help has no use for
    from tieback.classic_rl.plots import draw_policy_map

    draw_policy_map(folder / "policy_map.png", greedy(network))
    with gym.make(ENVIRONMENT_ID, render_mode="rgb_array") as env:
        write_video(folder / "episode.mp4", film_episode(env, greedy(network), _FINAL_SEED), fps=50)
    write_metrics(folder, metrics)
    accelerator.end_training()

    print_metrics(f"cartpole ({arguments.algorithm}) → {folder}", metrics)


def parse(argv: list[str]) -> tuple[CartPoleArguments, dqn.DQNArguments | CartPolePPOArguments]:
    """Read the flags; which ones there are depends on the algorithm."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--algorithm", default="dqn")
    algorithm = first.parse_known_args(argv)[0].algorithm
    settings = CartPolePPOArguments if algorithm == "ppo" else dqn.DQNArguments
    return parse_flags((CartPoleArguments, settings), "python -m classic_rl.cartpole", argv)


if __name__ == "__main__":
    run(lambda: main(*parse(sys.argv[1:])))
