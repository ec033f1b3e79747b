"""Tieback: PPO-based RLHF on the current Hugging Face stack, and the classic tasks that prove the same PPO code.

    from tieback import PPOConfig, PPOTrainer, RewardScorer

The folders beside this file are its sub-packages: `tieback.ppo_core`, `tieback.pipeline`, and so on.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tieback.pipeline.trainer import PPOConfig, PPOTrainer
    from tieback.reward_model.scoring import RewardScorer

__all__ = ["PPOConfig", "PPOTrainer", "RewardScorer"]

# TRL's trainers report usage through the hub's telemetry; Tieback sends nothing. The variable is for child processes
# and for a huggingface_hub that is imported later, the constant for one that was imported before.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TRACKIO_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "huggingface_hub.constants" in sys.modules:
    sys.modules["huggingface_hub.constants"].HF_HUB_DISABLE_TELEMETRY = True  # type: ignore[attr-defined]

_HOMES = {
    "PPOConfig": "tieback.pipeline.trainer",
    "PPOTrainer": "tieback.pipeline.trainer",
    "RewardScorer": "tieback.reward_model.scoring",
}


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` when it is first asked for: `tieback.ppo_core` alone needs no Transformers."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
