"""Ctrl-C and SIGTERM in a training: the step is finished and a checkpoint saved."""

import os
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import Any

import psutil
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from tieback.cli.processes import has_ended, leave, peers_on_this_machine

# torchrun passes a signal on to its processes, which a terminal or a scheduler has sent it, too: that is one, not two.
SECONDS_OF_ONE_SIGNAL = 1.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0


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

    torchrun also sends SIGTERM to the processes that are left when one of them has died. Nothing can be finished then:
    they leave at once, even while the main thread waits within a collective operation.

    It listens within a `with` block; after it, whether it ended well or not, the signals are what they were.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._handlers: dict[int, Any] = {}
        self._peers: list[psutil.Process] = []
        self._first_signal = 0.0
        self._wakeup_before = -1
        self._wakeup: socket.socket | None = None

    def __enter__(self) -> None:
        self.interrupted = False
        # Only the main thread may take over signals.
        if threading.current_thread() is not threading.main_thread():
            return
        self._peers = peers_on_this_machine()
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._on_signal)
        if self._peers:
            self._watch()

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()
        if self._wakeup is not None:
            signal.set_wakeup_fd(self._wakeup_before)
            self._wakeup.close()
            self._wakeup = None

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
        self._leave_if_a_peer_has_died()
        now = time.monotonic()
        if not self.interrupted:
            self.interrupted, self._first_signal = True, now
            if os.environ.get("RANK", "0") == "0":
                print("\nFinishing this step and saving a checkpoint; once more to stop at once.", flush=True)
        elif number == signal.SIGINT and now - self._first_signal > SECONDS_OF_ONE_SIGNAL:
            raise KeyboardInterrupt

    def _leave_if_a_peer_has_died(self) -> None:
        if any(map(has_ended, self._peers)):
            leave(128 + signal.SIGTERM)

    def _watch(self) -> None:
        """Look after the peers at each signal in a thread: Python runs no handler while the main thread is in C++."""
        self._wakeup, listening = socket.socketpair()
        self._wakeup.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)

        def watch() -> None:
            with listening:
                while listening.recv(1):
                    self._leave_if_a_peer_has_died()

        threading.Thread(target=watch, daemon=True).start()

    def _any_process_interrupted(self) -> bool:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self.interrupted
        flags: list[bool | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(flags, self.interrupted)
        return any(flags)


def exit_if_interrupted(trainer: Trainer, interrupt: InterruptCallback) -> None:
    """Exit with status 130 where a training was interrupted."""
    if interrupt.interrupted:
        # The launcher ends all processes when one leaves, and the main process may still be marking its checkpoint.
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.print(
            f"Stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; the same command goes on."
        )
        sys.exit(130)
