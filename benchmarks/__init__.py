"""Ours beside its peers, in one run: `python -m benchmarks.llm_ppo`, `python -m benchmarks.pong` (see RESULTS.md)."""
