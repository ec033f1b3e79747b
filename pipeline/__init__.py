"""Stages of the fine-tuning pipeline: sft, collect, label, reward, ppo, evaluate."""
