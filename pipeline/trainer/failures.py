"""A rollout that fails, in training or evaluation, by the sampler or by a judge: all processes stop together, and what is learnt is saved."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator

from tieback.cli.errors import PeerFailure
from tieback.pipeline.resume import whole_checkpoints
from tieback.pipeline.trainer.checkpoints import STATE_FILE, CheckpointedTrainer


@contextmanager
def failing_together(accelerator: Accelerator) -> Iterator[None]:
    """Where the block fails on one process, it fails on all; they wait for one another at its end.

    Within it no process may wait for another, or those that are left would do so for ever.

    Args:
        accelerator: of the training; all processes must enter.

    Raises:
        PeerFailure: it failed on another process alone.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    failed = accelerator.reduce(torch.tensor(int(error is not None), device=accelerator.device), "sum")
    if error is not None:
        raise error
    if failed > 0:
        raise PeerFailure("another process failed in its part of a rollout.")


@contextmanager
def checkpoint_on_failure(
    trainer: CheckpointedTrainer, restore_random_state: Callable[[], None]
) -> Iterator[None]:
    """Where the block fails in training, which must be on all processes alike, save a checkpoint of the iteration before it.

    Args:
        trainer: whose weights and optimiser the block does not change.
        restore_random_state: takes random numbers back to the end of that iteration, so that the run that resumes samples
            what this one would have.
    """
    try:
        yield
    except Exception:
        if trainer.is_in_train and trainer.state.global_step > 0:
            _save(trainer, restore_random_state)
        raise


def _save(trainer: CheckpointedTrainer, restore_random_state: Callable[[], None]) -> None:
    folder = Path(trainer.args.output_dir, f"checkpoint-{trainer.state.global_step}")
    if folder not in whole_checkpoints(trainer.args.output_dir, STATE_FILE):
        restore_random_state()
        try:
            trainer._save_checkpoint(trainer.model, None)
        except Exception as error:  # the first error is the one to be told
            trainer.accelerator.print(
                f"No checkpoint could be saved ({type(error).__name__}: {error}).", file=sys.stderr
            )
            return
    trainer.accelerator.print(f"The rollout failed; {folder} has all that came before it.", file=sys.stderr)
