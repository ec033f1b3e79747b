"""Resuming with the settings of this start: what a checkpoint holds of the earlier ones does not overrule them."""

from typing import Any, TypeVar, cast

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Trainer

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)

# Settings that optimisers keep in their parameter groups, and so in their state.
_GROUP_SETTINGS = ("initial_lr", "weight_decay", "betas", "eps", "momentum")


class ResumableTrainer(Trainer):
    """A Trainer that goes on from a checkpoint with the learning rates, decay, betas and intervals of its own arguments.

    Trainer itself would bring back the checkpoint's. Where nothing has changed, nothing differs by a bit. The rate of a
    schedule that is no function of the step (reduce_lr_on_plateau, or one given as an object) is left as it was loaded.
    """

    _own_groups: list[dict[str, Any]]

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Make the schedule. It comes between the optimiser and the loading of its state, on every backend."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        self._own_groups = [
            {name: group[name] for name in _GROUP_SETTINGS if name in group}
            for group in self.optimizer.param_groups
        ]
        return scheduler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run that was killed between its last checkpoint and its end has no step left to take; Trainer would take one.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._take_up_settings()

    def _take_up_settings(self) -> None:
        """Put this start's settings in the place of those that were loaded."""
        for group, own in zip(self.optimizer.param_groups, self._own_groups, strict=True):
            group.update(own)
        if isinstance(self.lr_scheduler, LambdaLR):
            _restart_schedule(self.lr_scheduler, self.optimizer)
        self.state.compute_steps(self.args, self.state.max_steps)


def resumable(trainer_class: type[AnyTrainer]) -> type[AnyTrainer]:
    """A trainer class with what `ResumableTrainer` adds."""
    return cast(
        type[AnyTrainer], type(trainer_class.__name__, (ResumableTrainer, trainer_class), {"__doc__": None})
    )


def _restart_schedule(scheduler: LambdaLR, optimizer: Optimizer) -> None:
    """Set the learning rates that the schedule has at its present step."""
    scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    rates = [
        rate * factor(scheduler.last_epoch)
        for rate, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
