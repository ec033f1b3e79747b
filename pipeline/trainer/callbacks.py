"""What a person sees of a running PPO, and how ctrl-C ends it without losing anything."""

import html
import signal
import threading
from collections.abc import Iterable, Sequence
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ProgressCallback

from tieback.data.conversations import TextOrMessages, as_messages, last_text
from tieback.pipeline.trainer.config import PPOConfig
from tieback.pipeline.trainer.rollout import ScoredRollout
from tieback.pipeline.trainer.trl_internals import print_prompt_completions_sample

# Figures of the progress line, in its order, with the names that fit on it.
SHOWN = {
    "reward/mean": "reward",
    "kl/ref": "kl",
    "policy/entropy": "entropy",
    "policy/clip_fraction": "clipped",
    "value/explained_variance": "critic",
    "completions/mean_length": "length",
}


class PPOProgressCallback(ProgressCallback):
    """Trainer's bar (rate and time left), with one line of the figures that matter instead of whole dictionaries."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the line above the bar."""
        if self.training_bar is None or not logs:
            return
        prefix = "eval_" if any(name.startswith("eval_") for name in logs) else ""
        figures = [
            f"{label} {logs[prefix + name]:.3g}" for name, label in SHOWN.items() if prefix + name in logs
        ]
        if figures:
            where = "evaluation" if prefix else f"iteration {state.global_step}"
            self.training_bar.write(f"{where:>14}  " + "  ".join(figures))


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
        print("\nFinishing this iteration and saving a checkpoint; once more to stop at once.", flush=True)

    def _any_process_interrupted(self) -> bool:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self.interrupted
        flags: list[bool | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(flags, self.interrupted)
        return any(flags)


def show_completions(
    callbacks: Iterable[TrainerCallback],
    scored: ScoredRollout,
    reward_names: Sequence[str],
    step: int,
    args: PPOConfig,
) -> None:
    """Show some completions in TensorBoard, and in the terminal where that is wanted."""
    rollout, scores, count = scored.rollout, scored.scores.tolist(), args.num_completions_to_print
    write_completions(callbacks, rollout.prompts[:count], rollout.completions[:count], scores[:count], step)
    if args.log_completions:
        rewards = {name: column.tolist() for name, column in zip(reward_names, scored.rewards.T, strict=True)}
        print_prompt_completions_sample(rollout.prompts, rollout.completions, rewards, scores, step, count)


def write_completions(
    callbacks: Iterable[TrainerCallback],
    prompts: Sequence[TextOrMessages],
    completions: Sequence[TextOrMessages],
    scores: Sequence[float],
    step: int,
) -> None:
    """Write completions where TensorBoard shows texts; nothing where TensorBoard is not reported to."""
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            text = "\n\n".join(
                f"**reward {score:.3g}**\n\n{_literal(prompt)}\n\n{_literal(completion)}"
                for prompt, completion, score in zip(prompts, completions, scores, strict=True)
            )
            callback.tb_writer.add_text("completions", text, step)


def _literal(value: TextOrMessages) -> str:
    """Text or messages as a block of Markdown that is shown as it is: what a model wrote is no markup."""
    if isinstance(value, list) and len(value) > 1:
        text = "\n".join(f"{message['role']}: {message['content']}" for message in as_messages(value))
    else:
        text = last_text(value)
    return "\n".join("    " + html.escape(line) for line in text.splitlines()) or "    (empty)"
