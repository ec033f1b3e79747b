"""Completions of a policy, for PPO, collect and evaluate alike: settings, sampling, scores of tokens, several processes."""
