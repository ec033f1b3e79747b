"""PPOTrainer and its rooms: config, actor-critic, models, rewards, checkpoints, checks."""

from tieback.pipeline.trainer.config import PPOConfig
from tieback.pipeline.trainer.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]
