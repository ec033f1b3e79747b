"""Settings of the reward model."""

from dataclasses import dataclass, field

from trl import ModelConfig, RewardConfig

from tieback.cli.errors import UsageError
from tieback.pipeline.arguments import RunArguments
from tieback.pipeline.resume import ResumeSettings


@dataclass
class PairArguments:
    """Which pairs to learn from."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Source of the pairs: a local file or a hub data set; where not set, the pairs of this round and of those before it, as collect left them ranked (collect/preferences.jsonl) or people did (label/preferences.jsonl)."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of the data set."})
    max_rows: int | None = field(default=None, metadata={"help": "Most pairs that are read of each round."})
    least_agreement: float | None = field(
        default=None,
        metadata={
            "help": "Leave out the pairs of annotators who order less than this share of the pairs that others ordered, too, as most of those do (0.6, say; told from 20 such pairs); nobody is left out where not set."
        },
    )
    least_pair_agreement: float | None = field(
        default=None,
        metadata={
            "help": "Where several annotators ordered the same two responses: make one pair of theirs, as most of them ordered it, and leave it out where less than this share of them did (1: all must agree; 0.5: the majority decides; a draw is left out). Each annotator's pair is one of its own where not set."
        },
    )

    def __post_init__(self) -> None:
        if self.least_agreement is not None and not 0 < self.least_agreement < 1:
            raise UsageError(
                f"least_agreement must be between 0 and 1, got {self.least_agreement}: a coin agrees in half of the pairs."
            )
        if self.least_pair_agreement is not None and not 0.5 <= self.least_pair_agreement <= 1:
            raise UsageError(
                f"least_pair_agreement must be from 0.5 (the majority decides) to 1 (all agree), got {self.least_pair_agreement}."
            )


@dataclass
class RewardArguments:
    """Pairs held out, what the scores are centred on, and how LoRA is written."""

    held_out_fraction: float = field(
        default=0.1, metadata={"help": "Share of the prompts whose pairs are held out for the report."}
    )
    demonstrations_name: str | None = field(
        default=None,
        metadata={
            "help": "Source of the demonstrations that score 0 on average: helpdesk, a file or a hub data set; the chosen responses of the training pairs where not set."
        },
    )
    merge_adapter: bool = field(
        default=False,
        metadata={
            "help": "With use_peft: write a whole model with the adapter merged in. Where not set, the adapter and the head stay by themselves, so that PPO can put them on the policy's base."
        },
    )
    num_demonstrations: int = field(default=1000, metadata={"help": "Most demonstrations of them."})


DATACLASS_TYPES = (RunArguments, PairArguments, RewardArguments, ResumeSettings, RewardConfig, ModelConfig)
