"""Ours beside its peers, one command for each: `llm_ppo`, `pong`, `memory`; figures in RESULTS.md."""
