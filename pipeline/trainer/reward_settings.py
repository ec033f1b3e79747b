"""Settings of the reward: what a score and the KL penalty come to, token by token."""

import math
from dataclasses import dataclass, field
from numbers import Real


@dataclass
class RewardSettings:
    """KL penalty and its reference, treatment of cut completions, and scale of the scores; inherited by `PPOConfig`."""

    kl_coef: float = field(default=0.05, metadata={"help": "Coefficient of the KL penalty in the reward."})
    kl_estimator: str = field(
        default="k1", metadata={"help": "Estimator of the KL penalty in the reward: k1, k2 or k3."}
    )
    kl_target: float | None = field(
        default=None,
        metadata={
            "help": "KL of a completion, in nats, that kl_coef is steered to; kl_coef is fixed where not set."
        },
    )
    kl_horizon: int = field(
        default=10_000,
        metadata={"help": "Completions over which the adaptive kl_coef changes by the order of itself."},
    )
    ref_model_sync_steps: int | None = field(
        default=None,
        metadata={
            "help": "Iterations after which the reference of the KL moves to the policy, or a share of the way there (ref_model_mixup_alpha); it stays where the training began where not set."
        },
    )
    ref_model_mixup_alpha: float = field(
        default=1.0,
        metadata={
            "help": "Share alpha of the policy in the reference that has moved: alpha * policy + (1 - alpha) * reference, weight by weight. 1 resets the reference to the policy."
        },
    )
    missing_eos_penalty: float = field(
        default=1.0,
        metadata={"help": "Subtracted from the score of a completion that was cut at max_completion_length."},
    )
    truncation: str = field(
        default="penalty",
        metadata={
            "help": "Treatment of a completion that is cut at the length limit: 'penalty' (it ends there, and missing_eos_penalty is charged), 'bootstrap' (it would have gone on: the critic's value of its end is added) or 'mask' (nothing is learnt from it).",
            "choices": ["penalty", "bootstrap", "mask"],
        },
    )
    overlong_buffer_length: int | None = field(
        default=None,
        metadata={
            "help": "With truncation 'penalty': a completion that ends by itself within so many tokens of max_completion_length is charged a share of missing_eos_penalty, which rises from 0 to 1 over them. None is charged where not set."
        },
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward function; 1 each where not set."}
    )
    per_token_reward_model: bool = field(
        default=False,
        metadata={
            "help": "Pay a reward model's score token by token: at each token what it adds to the score of the text so far. The sum is the score, and so is the best policy; the reward model must be a causal one with the policy's vocabulary."
        },
    )
    reward_clip: float | None = field(
        default=None,
        metadata={
            "help": "Clip scores, or each token's where they are given by token, to plus or minus this much, after normalising."
        },
    )
    normalize_each_reward: bool = field(
        default=False,
        metadata={
            "help": "Divide what each reward function gives by its own running standard deviation, before weights: several of unlike scales then count as reward_weights says."
        },
    )
    normalize_rewards: bool = field(
        default=False, metadata={"help": "Divide scores by their running standard deviation."}
    )

    def __post_init__(self) -> None:
        """Check ranges, and hand on to the next class that is inherited from.

        Raises:
            ValueError: a setting is out of range.
        """
        if self.kl_estimator not in ("k1", "k2", "k3"):
            raise ValueError(f"kl_estimator must be k1, k2 or k3, got {self.kl_estimator!r}.")
        if self.truncation not in ("penalty", "bootstrap", "mask"):
            raise ValueError(f"truncation must be 'penalty', 'bootstrap' or 'mask', got {self.truncation!r}.")
        for name in ("kl_coef", "missing_eos_penalty"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, got {getattr(self, name)}.")
        for name in (
            "kl_target",
            "kl_horizon",
            "reward_clip",
            "overlong_buffer_length",
            "ref_model_sync_steps",
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {value}.")
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise ValueError(
                f"ref_model_mixup_alpha must be above 0 and at most 1, got {self.ref_model_mixup_alpha}."
            )
        if self.ref_model_mixup_alpha != 1 and self.ref_model_sync_steps is None:
            raise ValueError(
                "ref_model_mixup_alpha says how far the reference moves, but ref_model_sync_steps is not set, so that it stays."
            )
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError(
                "kl_target steers kl_coef, which is 0 and would stay so: set kl_coef above 0 (kl_loss_coef is fixed)."
            )
        weights = self.reward_weights
        if weights is not None and not (
            isinstance(weights, list | tuple)
            and all(isinstance(weight, Real) and math.isfinite(weight) for weight in weights)
        ):
            raise ValueError(f"reward_weights must be a list of finite numbers, got {weights!r}.")
        parent = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()
