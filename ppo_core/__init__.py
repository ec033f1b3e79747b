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
    ppo_terms,
    value_loss,
)
from tieback.ppo_core.stats import PPOStats
from tieback.ppo_core.update import update

__all__ = [
    "AdaptiveKLController",
    "Batch",
    "FixedKLController",
    "PPOHyperparameters",
    "PPOStats",
    "PolicyOutputs",
    "RowLengths",
    "Term",
    "entropy",
    "explained_variance",
    "gae",
    "kl_estimate",
    "kl_loss",
    "length_adaptive_lambda",
    "masked_mean",
    "policy_loss",
    "ppo_terms",
    "update",
    "value_loss",
    "whiten",
]
