"""Reward functions that recipes name: `tieback.reward_functions.<module>:<function>`."""
