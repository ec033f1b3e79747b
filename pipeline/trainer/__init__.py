"""PPOTrainer and its rooms: config, models, actor-critic, optimiser, rewards, figures, checkpoints, checks."""

from typing import TYPE_CHECKING, Any

from tieback.pipeline.trainer.config import PPOConfig

if TYPE_CHECKING:
    from tieback.pipeline.trainer.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]


def __getattr__(name: str) -> Any:
    """Import `PPOTrainer` when it is first asked for: a program's help needs the settings alone."""
    if name != "PPOTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tieback.pipeline.trainer.trainer import PPOTrainer

    return PPOTrainer
