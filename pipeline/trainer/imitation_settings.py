"""Settings of what the policy imitates beside PPO."""

import math
from dataclasses import dataclass, field


@dataclass
class ImitationSettings:
    """Texts of a data set, and completions that scored well; inherited by `PPOConfig`."""

    ptx_coef: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the language-model loss on the texts of ptx_dataset, in nats a token, beside PPO's own (γ of InstructGPT's PPO-ptx)."
        },
    )
    ptx_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Texts of ptx_dataset that a process draws for an iteration; as many as completions where not set."
        },
    )
    ptx_max_length: int = field(
        default=512,
        metadata={"help": "Most tokens of a text of ptx_dataset; what is behind them is cut off."},
    )
    positive_nll_coef: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the language-model loss on the policy's own completions whose raw score is at least positive_score, in nats a token (0.1 in VAPO)."
        },
    )
    positive_score: float | None = field(
        default=None, metadata={"help": "Raw score from which on positive_nll_coef imitates a completion."}
    )

    def __post_init__(self) -> None:
        """Check ranges, and hand on to the next class that is inherited from.

        Raises:
            ValueError: a setting is out of range.
        """
        for name in ("ptx_coef", "positive_nll_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, got {getattr(self, name)}.")
        for name in ("ptx_batch_size", "ptx_max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if (self.positive_nll_coef > 0) != (self.positive_score is not None):
            raise ValueError(
                "positive_nll_coef imitates completions whose raw score is at least positive_score: set both, or neither."
            )
        parent = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()
