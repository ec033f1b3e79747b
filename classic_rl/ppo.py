"""The training loop of PPO on a vector environment, which CartPole and Pong share.

An iteration is: a rollout with its advantages (`Collector.collect`, which calls `gae`), `ppo_core.update`, a line in the
log, and from time to time a checkpoint. What a task does beside that (evaluate, select, draw) it does between
iterations:

    for iteration in train(policy, optimizer, collector, settings, accelerator):
        if iteration.last:
            print(iteration.figures["return/mean_100"])
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from tieback import ppo_core
from tieback.classic_rl.checkpoints import save_checkpoint
from tieback.classic_rl.interruption import Interruption
from tieback.classic_rl.networks import ActorCritic
from tieback.classic_rl.rollout import Collector
from tieback.classic_rl.settings import PPOArguments
from tieback.ppo_core import Batch

# Iterations after which the environments begin anew, so that a resume has no more moves than these to play again.
_ITERATIONS_OF_MOVES = 200


@dataclass
class Iteration:
    """What one iteration did.

    Args:
        steps: of all environments together, since the start of the training.
        figures: what was logged, under the names of docs/glossary.md.
        batch: the rollout, `[environments, num_steps]`.
        seconds: time that it took.
        last: whether no other follows (unless it is interrupted before).
    """

    steps: int
    figures: dict[str, float]
    batch: Batch
    seconds: float
    last: bool


@dataclass
class Checkpointing:
    """What a training needs to be stopped at any moment, and resumed as if it had not been.

    Args:
        folder: of the run.
        every: environment steps between checkpoints.
        environment_seed: seed of the environments that begin anew at an iteration.
        progress: returns what the task keeps between iterations, as JSON; called at each checkpoint.
        interruption: looked at after each iteration: where a stop is requested, a checkpoint is saved and the
            training ends.
    """

    folder: Path
    every: int
    environment_seed: Callable[[int], int]
    progress: Callable[[], dict[str, Any]]
    interruption: Interruption


def train(
    policy: ActorCritic,
    optimizer: torch.optim.Optimizer,
    collector: Collector,
    settings: PPOArguments,
    accelerator: Accelerator,
    *,
    steps: int = 0,
    checkpointing: Checkpointing | None = None,
) -> Iterator[Iteration]:
    """Train a policy in place, and hand over control after each iteration.

    The learning rate falls to 0 linearly, and with `anneal_ent_coef` so does the weight of the entropy bonus. Between
    two iterations the caller may change what the policy knows of its observations (`observe_frames`): a checkpoint is
    saved after that.

    Args:
        policy: on the accelerator's device.
        optimizer: over its parameters.
        collector: steps `settings.num_envs` environments.
        settings: of PPO.
        accelerator: where to compute, and what logs.
        steps: environment steps that were trained before, where `load_checkpoint` brought everything to.
        checkpointing: save checkpoints; None for none.

    Yields:
        Each iteration, logged already. A checkpoint is saved after the caller asks for the next one.
    """
    per_iteration, num_iterations = settings.steps_per_iteration, settings.num_iterations
    saved = steps
    for number in range(steps // per_iteration, num_iterations):
        started = time.perf_counter()
        if checkpointing is not None and number and number % _ITERATIONS_OF_MOVES == 0:
            collector.restart(checkpointing.environment_seed(number))
        remaining = 1 - number / num_iterations
        learning_rate = settings.learning_rate * remaining
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        ent_coef = settings.ent_coef * (remaining if settings.anneal_ent_coef else 1)
        with accelerator.autocast():
            batch = collector.collect(policy, settings.num_steps, settings.gamma, settings.gae_lambda)
        stats = ppo_core.update(
            policy,
            optimizer,
            _laid_out(batch.flatten_time()),
            replace(settings, ent_coef=ent_coef),
            accelerator,
            micro_batch_size=per_iteration // settings.num_minibatches,
        )
        steps = (number + 1) * per_iteration
        seconds = time.perf_counter() - started
        figures = {
            **stats.metrics(),
            **_episode_figures(collector),
            "train/steps_per_second": per_iteration / seconds,
            "learning_rate": learning_rate,
            "ent_coef": ent_coef,
        }
        accelerator.log(figures, steps)
        last = number == num_iterations - 1
        yield Iteration(steps, figures, batch, seconds, last)
        if checkpointing is not None:
            stopping = checkpointing.interruption.requested
            if last or stopping or steps - saved >= checkpointing.every:
                save_checkpoint(
                    checkpointing.folder, steps, policy, optimizer, collector, checkpointing.progress()
                )
                saved = steps
            if stopping:
                return


def _laid_out(batch: Batch) -> Batch:
    """The same numbers; pictures in the layout in which convolutions read them, once instead of in every epoch."""
    laid_out = {
        name: value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value
        for name, value in batch.inputs.items()
    }
    return replace(batch, inputs=laid_out)


def _episode_figures(collector: Collector) -> dict[str, float]:
    figures = {"train/episodes": float(collector.num_episodes)}
    returns = list(collector.recent_returns)
    if returns:
        figures["return/mean_100"] = sum(returns) / len(returns)
        figures["return/mean_20"] = sum(returns[-20:]) / len(returns[-20:])
    return figures
