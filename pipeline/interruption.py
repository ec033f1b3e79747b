"""Ctrl-C in a training: the step is finished and a checkpoint saved."""

import signal
import sys
import threading
from types import FrameType
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput


def train_interruptibly(trainer: Trainer, resume: str | None) -> TrainOutput:
    """Train; where it is interrupted, save a checkpoint, say how to go on, and exit with status 130."""
    interrupt = InterruptCallback()
    trainer.add_callback(interrupt)
    with interrupt:
        result = trainer.train(resume_from_checkpoint=resume)
    exit_if_interrupted(trainer, interrupt)
    return result


class InterruptCallback(TrainerCallback):
    """On SIGINT or SIGTERM: finish the iteration, save a checkpoint and stop. A second SIGINT stops at once.

    It listens within a `with` block; after it, whether it ended well or not, the signals are what they were.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> None:
        self.interrupted = False
        # Only the main thread may take over signals.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._on_signal)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Save and stop after this iteration if any process was signalled."""
        if self._any_process_interrupted():
            self.interrupted = True
            control.should_save = True
            control.should_training_stop = True
        return control

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        print("\nFinishing this step and saving a checkpoint; once more to stop at once.", flush=True)

    def _any_process_interrupted(self) -> bool:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self.interrupted
        flags: list[bool | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(flags, self.interrupted)
        return any(flags)


def exit_if_interrupted(trainer: Trainer, interrupt: InterruptCallback) -> None:
    """Exit with status 130 where a training was interrupted."""
    if interrupt.interrupted:
        trainer.accelerator.print(
            f"Stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; the same command goes on."
        )
        sys.exit(130)
