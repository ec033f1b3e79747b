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

from tieback import ppo_core
from tieback.classic_rl import dqn
from tieback.classic_rl.evaluation import Act, episode_returns, film_episode, write_video
from tieback.classic_rl.networks import MlpActorCritic, q_network
from tieback.classic_rl.output import require_positive, save_weights, tracking_accelerator
from tieback.classic_rl.plots import draw_policy_map
from tieback.classic_rl.rollout import Collector
from tieback.cli.arguments import parse_flags
from tieback.cli.errors import run
from tieback.cli.results import print_metrics, write_json, write_metrics
from tieback.ppo_core import PPOHyperparameters

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

    algorithm: str = field(default="dqn", metadata={"help": "How to learn.", "choices": ["dqn", "ppo"]})
    seed: int = field(default=0, metadata={"help": "Seed of everything random."})
    output_dir: str = field(
        default="", metadata={"help": "Folder to write into; runs/cartpole/<algorithm> when not given."}
    )
    report_to: str = field(
        default="tensorboard",
        metadata={
            "help": "Where figures are logged.",
            "choices": ["tensorboard", "wandb", "trackio", "none"],
        },
    )

    def __post_init__(self) -> None:
        self.output_dir = self.output_dir or f"runs/cartpole/{self.algorithm}"


@dataclass
class CartPolePPOArguments(PPOHyperparameters):
    """Settings of PPO on CartPole."""

    total_steps: int = field(
        default=300_000, metadata={"help": "Steps of the environments together, at most."}
    )
    num_envs: int = field(default=16, metadata={"help": "Environments that are stepped together."})
    num_steps: int = field(default=64, metadata={"help": "Steps of each environment in a rollout."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Of Adam; it falls to 0 linearly."})
    eval_every: int = field(default=8_192, metadata={"help": "Steps between evaluations."})
    vf_coef: float = field(default=0.5, metadata={"help": "Weight of the value loss."})
    ent_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy bonus."})
    gamma: float = field(default=0.99, metadata={"help": "Discount."})
    gae_lambda: float = field(default=0.9, metadata={"help": "Lambda of generalised advantage estimation."})
    num_ppo_epochs: int = field(default=8, metadata={"help": "Passes over each rollout."})
    num_minibatches: int = field(default=4, metadata={"help": "Parts of a rollout; one optimiser step each."})
    max_grad_norm: float = field(default=0.5, metadata={"help": "Bound on the norm of the gradient."})
    value_clip_range: float | None = field(
        default=None, metadata={"help": "Range of the values around those of the rollout; none by default."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "total_steps", "num_envs", "num_steps", "eval_every")


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
    network: nn.Module, settings: dqn.DQNArguments, seed: int
) -> Iterator[tuple[int, dict[str, float]]]:
    """Train by Double DQN in place; yields steps and figures between evaluations."""
    for progress in dqn.train(network, make_env(settings.num_envs), settings, seed):
        yield progress.env_steps, {"train/epsilon": progress.epsilon, "value/loss": progress.loss}


def train_ppo(
    network: MlpActorCritic, settings: CartPolePPOArguments, seed: int, accelerator: Accelerator
) -> Iterator[tuple[int, dict[str, float]]]:
    """Train by PPO in place; yields steps and figures between evaluations."""
    optimizer = torch.optim.Adam(network.parameters(), lr=settings.learning_rate, eps=1e-5)
    collector = Collector(make_env(settings.num_envs), seed, accelerator.device)
    per_iteration = settings.num_envs * settings.num_steps
    num_iterations = -(-settings.total_steps // per_iteration)
    next_report = settings.eval_every
    for iteration in range(num_iterations):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 - iteration / num_iterations)
        batch = collector.collect(network, settings.num_steps, settings.gamma, settings.gae_lambda)
        stats = ppo_core.update(
            network, optimizer, batch.flatten_time(), settings, accelerator, micro_batch_size=per_iteration
        )
        steps = (iteration + 1) * per_iteration
        if steps >= next_report or iteration == num_iterations - 1:
            next_report += settings.eval_every
            yield steps, stats.metrics()


def train_to_the_best(
    network: nn.Module,
    reports: Iterator[tuple[int, dict[str, float]]],
    total_steps: int,
    folder: Path,
    accelerator: Accelerator,
) -> tuple[dict[str, Tensor], int]:
    """Follow a training, evaluate at each report, and keep the best policy, on disk too.

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
        for steps, figures in reports:
            mean_return = float(episode_returns(env, greedy(network), _SELECTION_SEED).mean())
            rate = steps / (time.perf_counter() - started)
            accelerator.log(
                {**figures, "eval/mean_return": mean_return, "train/steps_per_second": rate}, steps
            )
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
        reports = train_dqn(network, settings, arguments.seed)
    else:
        network = actor_critic = MlpActorCritic(len(MAGNITUDES), NUM_ACTIONS)
        reports = train_ppo(actor_critic, settings, arguments.seed, accelerator)
    best, steps = train_to_the_best(network, reports, settings.total_steps, folder, accelerator)
    seconds = time.perf_counter() - started

    network.load_state_dict(best)
    returns = episode_returns(make_env(NUM_EVAL_EPISODES), greedy(network), _FINAL_SEED)
    metrics = {
        "eval/mean_return": float(returns.mean()),
        "eval/min_return": float(returns.min()),
        "train/env_steps": float(steps),
        "train/seconds": seconds,
    }
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
