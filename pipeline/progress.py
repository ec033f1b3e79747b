"""What is seen of a training by Transformers' Trainer: its bar, and how long it took to begin."""

import time
from typing import Any

import psutil
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback


class FiguresInBar(ProgressCallback):
    """Trainer's bar (rate and time left), with the latest figures behind it instead of a dictionary for each log.

    Args:
        shown: the figures that matter, in the order of the bar: name in the log, and name in the bar.
    """

    def __init__(self, shown: dict[str, str]) -> None:
        super().__init__()
        self.shown = shown

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put the figures behind the bar."""
        logs = logs or {}
        figures = [f"{label} {logs[name]:.3g}" for name, label in self.shown.items() if name in logs]
        if figures and self.training_bar is not None:
            self.training_bar.set_postfix_str("  ".join(figures))


def show_figures(trainer: Trainer, shown: dict[str, str]) -> None:
    """Show these figures behind the bar of `trainer` (see `FiguresInBar`); do nothing where it has no bar."""
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(FiguresInBar(shown))


class FirstStep(TrainerCallback):
    """Seconds from the start of this process to its first step: libraries, models, data, checks."""

    def __init__(self) -> None:
        self._seconds: float | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock, once."""
        if self._seconds is None:
            self._seconds = time.time() - psutil.Process().create_time()

    def figures(self) -> dict[str, float]:
        """`train/seconds_to_first_step`; nothing where no step was left to do."""
        return {} if self._seconds is None else {"train/seconds_to_first_step": self._seconds}
