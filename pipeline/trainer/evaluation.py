"""Evaluation of a policy on prompts, shared out over processes, as a Trainer offers it."""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from torch import Tensor

from tieback.cli.errors import UsageError
from tieback.pipeline.rollout.random_state import kept_random_state
from tieback.pipeline.rollout.responses import equal_share
from tieback.pipeline.scorers import Scorer, check_call
from tieback.pipeline.trainer.figures import mean_figures
from tieback.pipeline.trainer.input_checks import check_dataset
from tieback.pipeline.trainer.logged import LoggedTrainer
from tieback.pipeline.trainer.prompt_sets import PromptRows, by_name, read_eval_sets

Row = dict[str, Any]


class EvaluatedTrainer(LoggedTrainer):
    """A Trainer whose evaluation completes prompts and scores the completions.

    Attributes:
        scorers: reward functions and reward models.
    """

    scorers: Sequence[Scorer]
    control: Any

    def figures(self, rows: list[Row]) -> dict[str, Tensor]:
        """Complete and score B prompt rows; each figure [B], by its name in the log."""
        raise NotImplementedError

    def evaluate(
        self,
        eval_dataset: PromptRows | Mapping[str, PromptRows] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Complete and score the evaluation prompts with the policy as it is; training's random state is untouched.

        Args:
            eval_dataset: in the place of the trainer's own: one data set, or several by name.
            ignore_keys: not used; Trainer passes it.
            metric_key_prefix: stands before each figure's name, and `<metric_key_prefix>_<name>` before those of one of
                several data sets.

        Returns:
            Means over all prompts of a data set, under the training metrics' names with the prefix before them.

        Raises:
            UsageError: there is no data set, or it cannot be used.
        """
        sets = self.eval_dataset if eval_dataset is None else self._read(eval_dataset)
        if sets is None:
            raise UsageError("evaluate() needs prompts: give it, or the trainer, an eval_dataset.")
        if not isinstance(sets, dict):
            return self._evaluate_set(sets, metric_key_prefix)
        metrics: dict[str, float] = {}
        for name, dataset in sets.items():
            metrics |= self._evaluate_set(dataset, f"{metric_key_prefix}_{name}")
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse what Trainer offers for models that label what they are given.

        Raises:
            NotImplementedError: always; the message names what there is instead.
        """
        raise NotImplementedError(
            "PPOTrainer has no labels to predict: evaluate(dataset) gives the figures of a data set, and generate(rows) "
            "completions of its rows."
        )

    def _read(self, given: PromptRows | Mapping[str, PromptRows]) -> Dataset | dict[str, Dataset] | None:
        sets = read_eval_sets(given)
        for name, dataset in by_name("eval_dataset", sets).items():
            check_dataset(name, dataset, self.processing_class, self.model.config, self.args)
            check_call(self.scorers, name, dataset, more_columns=self.rollout_func is not None)
        return sets

    def _evaluate_set(self, dataset: Dataset, prefix: str) -> dict[str, float]:
        size = self.args.per_device_eval_batch_size
        own = equal_share(len(dataset), self.accelerator.process_index, self.accelerator.num_processes)
        with kept_random_state(self.accelerator.device):
            set_seed((self.args.seed + self.accelerator.process_index) % 2**32)
            parts = [
                self.figures([dataset[row] for row in own[start : start + size]])
                for start in range(0, len(own), size)
            ]
        # The rows that `equal_share` repeats stand at the end.
        own_figures = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        figures = {
            name: column[: len(dataset)].cpu()
            for name, column in self.accelerator.gather(own_figures).items()
        }
        metrics = {f"{prefix}_{name}": value for name, value in mean_figures(figures).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
