"""Settings of PPO: of the objective and of `update`."""

import math
from dataclasses import dataclass, field

from tieback.ppo_core.value_bins import LEAST_BINS


@dataclass
class PPOHyperparameters:
    """Settings of the objective and of `update`.

    A configuration may inherit from it together with other dataclasses, such as Transformers' `TrainingArguments`.

    Raises:
        ValueError: a setting is out of its range.
    """

    clip_range: float = field(
        default=0.2, metadata={"help": "Range ε of the policy's ratio: it is clipped below 1 - clip_range."}
    )
    clip_range_high: float | None = field(
        default=None,
        metadata={"help": "The ratio is clipped above 1 + clip_range_high; clip_range when not given."},
    )
    dual_clip: float | None = field(
        default=None,
        metadata={
            "help": "Bound on the loss of bad actions that became likelier: where the advantage A is negative, the objective is at least dual_clip * A; > 1, no bound when not given."
        },
    )
    value_clip_range: float | None = field(
        default=0.2,
        metadata={"help": "Range ε of the values around those of the rollout; null for no clipping."},
    )
    huber_delta: float | None = field(
        default=None,
        metadata={
            "help": "The value loss grows linearly, not as the square, where a value is off by more than this; null for squares everywhere."
        },
    )
    value_bins: int | None = field(
        default=None,
        metadata={
            "help": "The critic says how likely each of so many values is, and is fitted as a classifier; null for a critic of one number. 101, say; needs value_clip_range and huber_delta null."
        },
    )
    value_range: float = field(
        default=10.0,
        metadata={
            "help": "With value_bins: the values lie between -value_range and value_range; twice the largest return to be expected."
        },
    )
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    ent_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy bonus."})
    kl_loss_coef: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the KL to the reference as a term of the loss; 0 for none. It pulls on each token by itself, and stands beside whitened advantages."
        },
    )
    kl_loss_estimator: str = field(
        default="k3",
        metadata={
            "help": "Estimator of the KL in the loss: k1 or k3 (mean and gradient unbiased, k3 with less noise), or k2 (the gradient of k3)."
        },
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount γ of the reward, a step."})
    gae_lambda: float = field(default=0.95, metadata={"help": "λ of generalised advantage estimation."})
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over each rollout."})
    num_minibatches: int = field(
        default=1, metadata={"help": "Parts of a rollout; one optimiser step each, in every pass."}
    )
    max_grad_norm: float = field(
        default=1.0,
        metadata={"help": "The norm of all gradients together is clipped to this; 0 for no clipping."},
    )
    target_kl: float | None = field(
        default=None,
        metadata={
            "help": "End an update before the step at which the approximate KL to the rollout's policy exceeds "
            "1.5 * target_kl; never when not given."
        },
    )
    whiten_advantages: bool = field(
        default=True, metadata={"help": "Scale the advantages of each rollout to mean 0 and variance 1."}
    )

    def __post_init__(self) -> None:
        self.validate()
        # A class that inherits from this one and from another dataclass gets the other's checks, too.
        parent = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()

    def validate(self) -> None:
        """Check each setting.

        Raises:
            ValueError: a setting is out of its range.
        """
        for name in (
            "clip_range",
            "clip_range_high",
            "value_clip_range",
            "huber_delta",
            "target_kl",
            "value_range",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be greater than 0, but is {value}.")
        if self.value_bins is not None:
            self._check_value_bins(self.value_bins)
        for name in ("vf_coef", "ent_coef", "kl_loss_coef", "max_grad_norm"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a finite number of at least 0, but is {value}.")
        for name in ("gamma", "gae_lambda"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be between 0 and 1, but is {value}.")
        for name in ("num_ppo_epochs", "num_minibatches"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name} must be a whole number of at least 1, but is {value}.")
        if self.kl_loss_estimator not in ("k1", "k2", "k3"):
            raise ValueError(f"kl_loss_estimator must be k1, k2 or k3, but is {self.kl_loss_estimator!r}.")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be greater than 1, but is {self.dual_clip}.")

    def _check_value_bins(self, value_bins: int) -> None:
        if not (isinstance(value_bins, int) and value_bins >= LEAST_BINS):
            raise ValueError(
                f"value_bins must be a whole number of at least {LEAST_BINS}, but is {value_bins}."
            )
        if not math.isfinite(self.value_range):
            raise ValueError(f"value_range must be finite, but is {self.value_range}.")
        for name in ("value_clip_range", "huber_delta"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)} shapes the squared error, which value_bins={value_bins} replaces by a "
                    f"classifier's: set {name} to null."
                )
