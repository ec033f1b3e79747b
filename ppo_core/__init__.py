"""The mathematics of PPO, for a paddle and for a language model alike: torch and accelerate only."""

from tieback.ppo_core.advantages import (
    explained_variance,
    gae,
    length_adaptive_lambda,
    masked_mean,
    whiten,
)
from tieback.ppo_core.batch import Batch, RowLengths
from tieback.ppo_core.hyperparameters import PPOHyperparameters
from tieback.ppo_core.kl_control import AdaptiveKLController, FixedKLController
from tieback.ppo_core.objective import (
    PolicyOutputs,
    Term,
    entropy,
    kl_estimate,
    kl_loss,
    policy_loss,
    policy_outputs,
    ppo_terms,
    value_loss,
)
from tieback.ppo_core.stats import PPOStats
from tieback.ppo_core.update import update
from tieback.ppo_core.value_bins import bin_offsets, expected_values, head_over_bins, two_hot_loss

__all__ = [
    "AdaptiveKLController",
    "Batch",
    "FixedKLController",
    "PPOHyperparameters",
    "PPOStats",
    "PolicyOutputs",
    "RowLengths",
    "Term",
    "bin_offsets",
    "entropy",
    "expected_values",
    "explained_variance",
    "gae",
    "head_over_bins",
    "kl_estimate",
    "kl_loss",
    "length_adaptive_lambda",
    "masked_mean",
    "policy_loss",
    "policy_outputs",
    "ppo_terms",
    "two_hot_loss",
    "update",
    "value_loss",
    "whiten",
]
