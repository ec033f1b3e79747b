"""The training loop of Pong: rollouts, `ppo_core.update`, checkpoints, logs."""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from tieback import ppo_core
from tieback.classic_rl.checkpoints import load_checkpoint, save_checkpoint
from tieback.classic_rl.networks import NatureActorCritic
from tieback.classic_rl.output import load_weights, require_positive, save_weights
from tieback.classic_rl.pong_environment import ACTION_NAMES, make_env
from tieback.classic_rl.pong_report import PongPolicy, greedy_returns
from tieback.classic_rl.rollout import Collector
from tieback.cli.errors import UsageError
from tieback.ppo_core import Batch, PPOHyperparameters

# The environments begin anew after so many iterations, so that a resume has no more moves than these to play again.
_ITERATIONS_OF_MOVES = 200
# Of the environments in which the policies to keep are selected.
_SELECTION_SEED = 1_000_000


@dataclass
class PongPPOArguments(PPOHyperparameters):
    """Settings of PPO on Pong; the defaults are those of the preset `fast`."""

    total_steps: int = field(
        default=1_000_000, metadata={"help": "Steps of the environments together (4 frames each)."}
    )
    num_envs: int = field(default=16, metadata={"help": "Environments that are stepped together."})
    num_steps: int = field(default=128, metadata={"help": "Steps of each environment in a rollout."})
    learning_rate: float = field(default=7e-4, metadata={"help": "Of Adam; it falls to 0 linearly."})
    clip_range: float = field(default=0.1, metadata={"help": "Range of the policy ratio."})
    value_clip_range: float | None = field(
        default=None, metadata={"help": "Range of the values around those of the rollout; none by default."}
    )
    vf_coef: float = field(default=0.5, metadata={"help": "Weight of the value loss."})
    ent_coef: float = field(default=0.01, metadata={"help": "Weight of the entropy bonus."})
    anneal_ent_coef: bool = field(
        default=True, metadata={"help": "Let ent_coef fall to 0 with the learning rate."}
    )
    gamma: float = field(default=0.99, metadata={"help": "Discount."})
    gae_lambda: float = field(default=0.95, metadata={"help": "Lambda of generalised advantage estimation."})
    num_ppo_epochs: int = field(default=2, metadata={"help": "Passes over each rollout."})
    num_minibatches: int = field(default=8, metadata={"help": "Parts of a rollout; one optimiser step each."})
    max_grad_norm: float = field(default=0.5, metadata={"help": "Bound on the norm of the gradient."})
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
        require_positive(
            self, "total_steps", "num_envs", "num_steps", "selection_every", "selection_episodes"
        )
        rows = self.num_envs * self.num_steps
        if rows % self.num_minibatches:
            raise UsageError(
                f"num_envs {self.num_envs} x num_steps {self.num_steps} = {rows} steps a rollout do not divide into "
                f"num_minibatches {self.num_minibatches}."
            )


@dataclass
class Status:
    """What a training is asked and told while it runs."""

    steps: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    # Steps, seconds and the mean return of the last 20 episodes, after each iteration that has one.
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    # Of the last 100 training episodes, or as many as there were.
    mean_return_100: float | None = None
    # Of the policy that is kept, in the evaluation that selected it.
    best_return: float | None = None


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
    a certain point in every game, or many in some, which a few updates earlier or later it does not. Ctrl-C lets the
    iteration end, saves a checkpoint and returns.

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
    collector = Collector(make_env(settings.num_envs), _environment_seed(seed, 0), accelerator.device)
    status = Status()
    if resume:
        status.steps, progress = load_checkpoint(folder, policy, optimizer, collector)
        status.seconds, status.curve = progress["seconds"], [tuple(point) for point in progress["curve"]]
        status.best_return = progress["best_return"]
    per_iteration = settings.num_envs * settings.num_steps
    num_iterations = -(-settings.total_steps // per_iteration)
    saved, best = status.steps, folder / "policy.safetensors"

    def save() -> None:
        nonlocal saved
        progress = {"seconds": status.seconds, "curve": status.curve, "best_return": status.best_return}
        save_checkpoint(folder, status.steps, policy, optimizer, collector, progress)
        saved = status.steps

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

    with _Bar(settings.total_steps) as bar, _Interruption(status):
        for iteration in range(status.steps // per_iteration, num_iterations):
            started = time.perf_counter()
            if iteration and iteration % _ITERATIONS_OF_MOVES == 0:
                collector.restart(_environment_seed(seed, iteration))
            remaining = 1 - iteration / num_iterations
            learning_rate = settings.learning_rate * remaining
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            ent_coef = settings.ent_coef * (remaining if settings.anneal_ent_coef else 1)
            with accelerator.autocast():
                batch = collector.collect(policy, settings.num_steps, settings.gamma, settings.gae_lambda)
            stats = ppo_core.update(
                policy,
                optimizer,
                batch.flatten_time(),
                replace(settings, ent_coef=ent_coef),
                accelerator,
                micro_batch_size=per_iteration // settings.num_minibatches,
            )
            if settings.normalize_frames:
                _observe_frames(policy, batch)
            status.steps = (iteration + 1) * per_iteration
            figures = _figures(collector, per_iteration / (time.perf_counter() - started))
            last = iteration == num_iterations - 1
            if last or status.steps % settings.selection_every < per_iteration:
                figures["eval/mean_return"] = select()
            status.seconds += time.perf_counter() - started
            if "return/mean_20" in figures:
                status.curve.append((status.steps, status.seconds, figures["return/mean_20"]))
                status.mean_return_100 = figures["return/mean_100"]
            annealed = {"learning_rate": learning_rate, "ent_coef": ent_coef}
            accelerator.log({**stats.metrics(), **figures, **annealed}, status.steps)
            bar.show(status.steps, figures, status.best_return)
            if on_iteration is not None:
                on_iteration(status.steps, policy)
            if status.interrupted:
                break
            if status.steps - saved >= save_every:
                save()
    if status.steps > saved:
        save()
    if status.best_return is None:
        save_weights(best, policy.state_dict())
    policy.load_state_dict(load_weights(best))
    return policy, status


def _observe_frames(policy: NatureActorCritic, batch: Batch) -> None:
    # Every fourth step is enough to know the pixels by.
    policy.observe_frames(batch.inputs["observations"][:, ::4, -1].flatten(0, 1))


def _environment_seed(seed: int, iteration: int) -> int:
    """Seed of the environments that begin at an iteration; each of them adds its own number."""
    return 1_000_003 * seed + 101 * iteration


def _figures(collector: Collector, steps_per_second: float) -> dict[str, float]:
    figures = {"train/steps_per_second": steps_per_second, "train/episodes": float(collector.num_episodes)}
    returns = list(collector.recent_returns)
    if returns:
        figures["return/mean_100"] = sum(returns) / len(returns)
        figures["return/mean_20"] = sum(returns[-20:]) / len(returns[-20:])
    return figures


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
        mean = figures.get("return/mean_20")
        # Short, so that the bar and the time left fit beside it into 80 columns.
        text = f"{figures['train/steps_per_second']:,.0f} steps/s  last 20 "
        text += "–" if mean is None else f"{mean:+.1f}"
        text += "" if best_return is None else f"  best {best_return:+.1f}"
        self._progress.update(self._task, completed=min(steps, self._total), description=text)


class _Interruption:
    """Turns the first ctrl-C (or SIGTERM) into a flag; the second one ends the program as usual."""

    def __init__(self, status: Status) -> None:
        self._status = status

    def __enter__(self) -> None:
        self._before = {name: signal.signal(name, self._handle) for name in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *_: Any) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._status.interrupted = True
        for name, handler in self._before.items():
            signal.signal(name, handler)
