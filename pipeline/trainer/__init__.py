"""PPOTrainer and its rooms: config, models, actor-critic, optimiser, rewards, figures, checkpoints, checks."""

from tieback.pipeline.trainer.config import PPOConfig
from tieback.pipeline.trainer.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]
