"""PPO on Pong: its settings, its bar, and the selection of the best greedy policy."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from tieback.classic_rl import ppo
from tieback.classic_rl.checkpoints import load_checkpoint
from tieback.classic_rl.interruption import Interruption
from tieback.classic_rl.networks import NatureActorCritic
from tieback.classic_rl.pong_environment import ACTION_NAMES, make_env
from tieback.classic_rl.pong_policy import PongPolicy, greedy_returns
from tieback.classic_rl.rollout import Collector
from tieback.classic_rl.settings import PPOArguments, new_default, require_positive
from tieback.classic_rl.weights import load_weights, save_weights
from tieback.ppo_core import Batch

# Seed of the environments in which the policy to keep is selected.
_SELECTION_SEED = 1_000_000
# The largest seed that ale-py takes.
_MAX_ENVIRONMENT_SEED = 2**31 - 1


@dataclass
class PongPPOArguments(PPOArguments):
    """Settings of PPO on Pong, where a step is 4 frames; the defaults are those of the preset `fast`."""

    total_steps: int = new_default(PPOArguments, "total_steps", 1_000_000)
    num_steps: int = new_default(PPOArguments, "num_steps", 128)
    learning_rate: float = new_default(PPOArguments, "learning_rate", 7e-4)
    clip_range: float = new_default(PPOArguments, "clip_range", 0.1)
    ent_coef: float = new_default(PPOArguments, "ent_coef", 0.01)
    anneal_ent_coef: bool = new_default(PPOArguments, "anneal_ent_coef", True)
    num_ppo_epochs: int = new_default(PPOArguments, "num_ppo_epochs", 2)
    num_minibatches: int = new_default(PPOArguments, "num_minibatches", 8)
    normalize_frames: bool = field(
        default=True,
        metadata={"help": "Show each pixel's deviation from its mean so far, not its grey level."},
    )
    selection_every: int = field(
        default=50_000,
        metadata={"help": "Environment steps between greedy evaluations; the best policy is kept."},
    )
    selection_episodes: int = field(default=10, metadata={"help": "Episodes of each of them."})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "selection_every", "selection_episodes")


@dataclass
class Status:
    """Where a training stands."""

    steps: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    # Steps, seconds and the mean return of the last 20 episodes, after each iteration that has one.
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    # Of the last 100 training episodes, or as many as there were.
    mean_return_100: float | None = None
    # Of the policy that is kept, in the evaluation that selected it.
    best_return: float | None = None

    def progress(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"seconds": self.seconds, "curve": self.curve, "best_return": self.best_return}


def environment_seed(seed: int, iteration: int, num_envs: int) -> int:
    """Seed of the environments that begin at an iteration; each of them adds its own number.

    Numbers too large for ale-py start again from 0. (So two seeds of the program may have the same environments; their
    weights and moves differ all the same.)
    """
    largest = _MAX_ENVIRONMENT_SEED - (num_envs - 1)
    return (1_000_003 * seed + 101 * iteration) % (largest + 1)


def train(
    settings: PongPPOArguments,
    seed: int,
    folder: Path,
    accelerator: Accelerator,
    save_every: int,
    resume: bool = False,
    on_iteration: Callable[[int, NatureActorCritic], None] | None = None,
) -> tuple[NatureActorCritic, Status]:
    """Train a policy, or go on training it.

    Every so often it plays greedily, and `policy.safetensors` is the best policy so far: a greedy policy may lose
    a certain point in every game, or many points in some games, and no longer do so a few updates later. After ctrl-C
    the iteration is finished, a checkpoint is saved, and the function returns.

    Args:
        settings: of PPO.
        seed: of everything random.
        folder: of the run.
        accelerator: where to compute, and what logs.
        save_every: environment steps between checkpoints.
        resume: start from the newest checkpoint of `folder`.
        on_iteration: called with the steps so far and the policy after each iteration.

    Returns:
        The best policy, and where training stands.

    Raises:
        UsageError: there is nothing to resume from.
    """
    torch.manual_seed(seed)
    policy = NatureActorCritic(len(ACTION_NAMES)).to(accelerator.device)
    # A step of Adam on the CPU is several times faster fused.
    optimizer = torch.optim.Adam(policy.parameters(), lr=settings.learning_rate, eps=1e-5, fused=True)

    def seed_at(iteration: int) -> int:
        return environment_seed(seed, iteration, settings.num_envs)

    collector = Collector(make_env(settings.num_envs), seed_at(0), accelerator.device)
    status, best = Status(), folder / "policy.safetensors"
    if resume:
        status.steps, progress = load_checkpoint(folder, policy, optimizer, collector)
        status.seconds, status.curve = progress["seconds"], [tuple(point) for point in progress["curve"]]
        status.best_return = progress["best_return"]

    def select() -> float:
        returns = greedy_returns(
            PongPolicy(policy, accelerator.device), settings.selection_episodes, _SELECTION_SEED
        )
        mean_return = float(returns.mean())
        # Of equals the later one, which has learnt more.
        if status.best_return is None or mean_return >= status.best_return:
            status.best_return = mean_return
            save_weights(best, policy.state_dict())
        return mean_return

    if settings.normalize_frames and not status.steps:
        _observe_frames(
            policy, collector.collect(policy, settings.num_steps, settings.gamma, settings.gae_lambda)
        )

    with _Bar(settings.total_steps) as bar, Interruption() as interruption:
        checkpointing = ppo.Checkpointing(folder, save_every, seed_at, status.progress, interruption)
        for iteration in ppo.train(
            policy,
            optimizer,
            collector,
            settings,
            accelerator,
            steps=status.steps,
            checkpointing=checkpointing,
        ):
            started = time.perf_counter()
            status.steps = iteration.steps
            if settings.normalize_frames:
                _observe_frames(policy, iteration.batch)
            if iteration.last or status.steps % settings.selection_every < settings.steps_per_iteration:
                accelerator.log({"eval/mean_return": select()}, status.steps)
            status.seconds += iteration.seconds + time.perf_counter() - started
            figures = iteration.figures
            if "return/mean_20" in figures:
                status.curve.append((status.steps, status.seconds, figures["return/mean_20"]))
                status.mean_return_100 = figures["return/mean_100"]
            bar.show(status.steps, figures, status.best_return)
            if on_iteration is not None:
                on_iteration(status.steps, policy)
        status.interrupted = interruption.requested
    if status.best_return is None:
        save_weights(best, policy.state_dict())
    policy.load_state_dict(load_weights(best))
    return policy, status


def _observe_frames(policy: NatureActorCritic, batch: Batch) -> None:
    # Every fourth step is enough for the statistics of the pixels.
    policy.observe_frames(batch.inputs["observations"][:, ::4, -1].flatten(0, 1))


class _Bar:
    """A bar with rate, mean return and time left."""

    def __init__(self, total_steps: int) -> None:
        self._progress = Progress(
            TextColumn("{task.completed:>9,.0f}/{task.total:,.0f} steps"),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        self._total = total_steps

    def __enter__(self) -> "_Bar":
        self._progress.start()
        self._task = self._progress.add_task("", total=self._total)
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()

    def show(self, steps: int, figures: dict[str, float], best_return: float | None) -> None:
        """Move the bar to `steps`."""
        mean = figures.get("return/mean_20")
        # Short, so that the bar and the time left fit beside it into 80 columns.
        text = f"{figures['train/steps_per_second']:,.0f} steps/s  last 20 "
        text += "–" if mean is None else f"{mean:+.1f}"
        text += "" if best_return is None else f"  best {best_return:+.1f}"
        self._progress.update(self._task, completed=min(steps, self._total), description=text)
