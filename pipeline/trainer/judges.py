"""Judges: reward functions and models that score evaluations and take no part in training.

What PPO maximises is a proxy; a judge says whether the proxy still measures what it should (Gao et al. 2022, "Scaling
Laws for Reward Model Overoptimization").
"""

from collections.abc import Mapping, Sequence

import torch
from datasets import Dataset
from torch import Tensor

from tieback.pipeline.rollout.texts import Rollout
from tieback.pipeline.scorers import (
    RewardSource,
    call_scorers,
    check_call,
    combine_rewards,
    make_scorers,
    unique_reward_names,
)
from tieback.reward_model.scoring import RewardScorer


class Judges:
    """The judges of a run, if any.

    Args:
        sources: as `reward_funcs` of `PPOTrainer`; None for none.
        batch_size: texts in a forward pass of a model.

    Raises:
        UsageError: one cannot be loaded, or is no judge.
    """

    def __init__(self, sources: RewardSource | Sequence[RewardSource] | None, batch_size: int) -> None:
        self.scorers = (
            [] if sources is None else make_scorers(sources, None, batch_size, setting="judge_funcs")
        )
        self.names = [f"judge/{name}" for name in unique_reward_names(self.scorers)]

    @property
    def models(self) -> list[RewardScorer]:
        """Those that are models."""
        return [scorer for scorer in self.scorers if isinstance(scorer, RewardScorer)]

    @property
    def figure_names(self) -> list[str]:
        """Names of the figures of `judge`."""
        return ["judge/mean", *self.names] if self.scorers else []

    def check(self, sets: Mapping[str, Dataset], more_columns: bool) -> None:
        """Check that each judge takes what it will be called with (see `check_call`)."""
        for name, dataset in sets.items():
            check_call(self.scorers, name, dataset, more_columns)

    def judge(self, rollout: Rollout, device: torch.device) -> dict[str, Tensor]:
        """Each judge's scores [B] of B completions, NaN where it does not judge, and their sum, by name; none without judges.

        Raises:
            RewardError: one failed, or none judges some completion.
        """
        if not self.scorers:
            return {}
        totals = [rewards.totals for rewards in call_scorers(self.scorers, rollout)]
        scores = torch.tensor(totals, device=device).T
        together = combine_rewards(scores, [1.0] * len(self.scorers), rollout)
        return {"judge/mean": together, **dict(zip(self.names, scores.T, strict=True))}
