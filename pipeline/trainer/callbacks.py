"""Display of a running PPO: the progress line, and completions in TensorBoard."""

import html
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ProgressCallback

from tieback.data.conversations import TextOrMessages, as_messages, last_text
from tieback.pipeline.trainer.config import PPOConfig
from tieback.pipeline.trainer.rewards import ScoredRollout
from tieback.pipeline.trl_internals import print_prompt_completions_sample

# Figures of the progress line, in its order, with the names that fit on it.
SHOWN = {
    "reward/mean": "reward",
    "judge/mean": "judge",
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
        means = [name for name in logs if name.endswith("reward/mean")]
        prefix = means[0].removesuffix("reward/mean") if means else ""
        figures = [
            f"{label} {logs[prefix + name]:.3g}" for name, label in SHOWN.items() if prefix + name in logs
        ]
        if figures:
            evaluation = f"evaluation {prefix.removeprefix('eval').strip('_')}".strip()
            where = evaluation if prefix else f"iteration {state.global_step}"
            self.training_bar.write(f"{where:>14}  " + "  ".join(figures))


def early_stopping(args: PPOConfig) -> list[TrainerCallback]:
    """The callback that ends a training whose evaluations no longer become better, where that is asked for."""
    patience = args.early_stopping_patience
    return [] if patience is None else [EarlyStoppingCallback(patience)]


def show_completions(
    callbacks: Iterable[TrainerCallback],
    scored: ScoredRollout,
    reward_names: Sequence[str],
    step: int,
    args: PPOConfig,
) -> None:
    """Show some completions in TensorBoard, and in the terminal where that is wanted."""
    rollout, scores, count = scored.rollout, scored.raw_scores.tolist(), args.num_completions_to_print
    write_completions(callbacks, rollout.prompts[:count], rollout.completions[:count], scores[:count], step)
    if args.log_completions:
        rewards = {name: column.tolist() for name, column in zip(reward_names, scored.rewards.T, strict=True)}
        rewards["weighted sum"] = scores
        print_prompt_completions_sample(rollout.prompts, rollout.completions, rewards, None, step, count)


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
