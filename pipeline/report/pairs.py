"""The rows of samples.jsonl (a prompt with both policies' responses and their scores) and the figures over them."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from tieback.data.conversations import last_text
from tieback.pipeline.rollout.texts import Rollout
from tieback.pipeline.sample_statistics import (
    bootstrap_interval,
    correlation,
    distinct_n,
    distinct_texts,
    repeated_n,
    win_outcomes,
)

SYSTEMS = ("sft", "ppo")
SCORES = ("gold_score", "reward_score")
Pair = dict[str, Any]


def make_pairs(
    rollouts: dict[str, Rollout],
    scores: dict[str, dict[str, list[float]]],
    log_ratios: Sequence[float],
    judge: str,
) -> list[Pair]:
    """Join both policies' responses to each prompt.

    Args:
        rollouts: N responses of each of `SYSTEMS`, to the same prompts.
        scores: by name of `SCORES`, then by policy, N scores.
        log_ratios: log π_ppo − log π_sft of each of PPO's responses.
        judge: the one of `scores` that decides the outcome: 1 PPO wins, 0 SFT wins, ½ a tie.
    """
    outcomes = win_outcomes(scores[judge]["ppo"], scores[judge]["sft"])
    first = rollouts["sft"]
    pairs: list[Pair] = [
        {
            "prompt": prompt,
            "columns": {name: values[row] for name, values in first.columns.items()},
            **{
                system: {
                    "response": last_text(rollout.completions[row]),
                    **{name: by_system[system][row] for name, by_system in scores.items()},
                    "num_tokens": len(rollout.completion_ids[row]),
                    "truncated": rollout.truncated[row],
                }
                for system, rollout in rollouts.items()
            },
            "outcome": float(outcomes[row]),
        }
        for row, prompt in enumerate(first.prompts)
    ]
    for pair, log_ratio in zip(pairs, log_ratios, strict=True):
        pair["ppo"]["log_ratio_to_sft"] = log_ratio
    return pairs


def evaluation_figures(pairs: Sequence[Pair], judge: str, resamples: int, seed: int) -> dict[str, float]:
    """Figures of metrics.json, each as docs/glossary.md says.

    Args:
        pairs: from `make_pairs`.
        judge: see `make_pairs`.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    outcomes = [pair["outcome"] for pair in pairs]
    low, high = bootstrap_interval(outcomes, resamples=resamples, seed=seed)
    metrics: dict[str, float] = {
        "num_prompts": len(pairs),
        "win_rate/ppo_vs_sft": fmean(outcomes),
        "win_rate/ci95_low": low,
        "win_rate/ci95_high": high,
    }
    if "reward_score" in pairs[0]["sft"]:
        by_reward_model = (column(pairs, "ppo", "reward_score"), column(pairs, "sft", "reward_score"))
        metrics["win_rate/reward_model"] = float(win_outcomes(*by_reward_model).mean())
    for name in SCORES:
        if name in pairs[0]["sft"]:
            metrics |= {f"{name}/{system}": fmean(column(pairs, system, name)) for system in SYSTEMS}
    metrics["kl/ppo_vs_sft"] = fmean(column(pairs, "ppo", "log_ratio_to_sft"))
    for system in SYSTEMS:
        texts = column(pairs, system, "response")
        metrics |= {
            f"response_length/{system}": fmean(column(pairs, system, "num_tokens")),
            f"truncated_fraction/{system}": fmean(column(pairs, system, "truncated")),
            f"distinct_1/{system}": distinct_n(texts, 1),
            f"distinct_2/{system}": distinct_n(texts, 2),
            f"distinct_responses/{system}": distinct_texts(texts),
            f"repeated_4/{system}": repeated_n(texts, 4),
        }
        if "reward_score" in pairs[0][system]:
            lengths, scores = column(pairs, system, "num_tokens"), column(pairs, system, "reward_score")
            metrics[f"reward_length_correlation/{system}"] = correlation(lengths, scores)
    return metrics


def column(pairs: Sequence[Pair], system: str, name: str) -> list[Any]:
    """One field of one policy's side, over all pairs."""
    return [pair[system][name] for pair in pairs]
