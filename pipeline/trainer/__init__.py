"""PPOTrainer and its rooms: config, actor-critic, rollout, rewards, checkpoints, checks."""

from .config import PPOConfig
from .trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]
