"""Stages of the fine-tuning pipeline: sft, collect, reward, ppo, evaluate."""

import os

# TRL's trainers report usage through the hub's telemetry; Tieback sends nothing. The variable is for child
# processes, the constant for a huggingface_hub that was imported before this package.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TRACKIO_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from huggingface_hub import constants

constants.HF_HUB_DISABLE_TELEMETRY = True
