"""Figures and completions of PPO's iterations, in the log and on the trackers."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from tieback.pipeline.trainer.callbacks import show_completions
from tieback.pipeline.trainer.rewards import ScoredRollout
from tieback.pipeline.trainer.uploads import UploadingTrainer


class LoggedTrainer(UploadingTrainer):
    """A Trainer that logs the means of what its iterations noted.

    Attributes:
        reward_names: of the columns of a rollout's rewards.
    """

    reward_names: Sequence[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._last_rollout: ScoredRollout | None = None
        super().__init__(*args, **kwargs)

    def note(self, figures: Mapping[str, float], scored: ScoredRollout) -> None:
        """Keep the figures of an iteration for the next log line, and its completions to be shown with that."""
        for name, value in figures.items():
            self._metrics[name].append(value)
        self._last_rollout = scored

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the means of the PPO metrics since the last log line in place of Trainer's own loss."""
        if "learning_rate" in logs:
            logs.pop("loss", None)
            logs.pop("grad_norm", None)
            for name, values in self._metrics.items():
                finite = [value for value in values if math.isfinite(value)]
                if finite:
                    logs[name] = sum(finite) / len(finite)
            self._metrics.clear()
            if self._last_rollout is not None and self.is_world_process_zero():
                show_completions(
                    self.callback_handler.callbacks,
                    self._last_rollout,
                    self.reward_names,
                    self.state.global_step,
                    self.args,
                )
        super().log(logs, start_time)
