"""Settings of collect."""

from dataclasses import dataclass, field

from tieback.cli.errors import UsageError
from tieback.pipeline.arguments import RunArguments
from tieback.pipeline.rollout.settings import RolloutSettings


@dataclass
class CollectArguments(RolloutSettings):
    """Prompts that are asked, the model that answers, and who ranks the answers."""

    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of the responses; <run_dir>/collect where not set."}
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Model that answers; where not set <run_dir>/sft, after round 1 the PPO policy of the round before."
        },
    )
    dtype: str = field(
        default="float32", metadata={"help": "Type of the model's weights: float32, bfloat16 or auto."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Source of the prompts: helpdesk (the built-in world), a local file (JSON, JSONL, CSV, Parquet), or a hub data set."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of the data set."})
    max_rows: int | None = field(
        default=None, metadata={"help": "Most prompts that are read; of helpdesk, how many are made."}
    )
    num_responses: int = field(default=4, metadata={"help": "Number of responses to each prompt, K."})
    batch_size: int = field(
        default=64, metadata={"help": "Number of prompts in a batch, which has K times as many sequences."}
    )
    annotator: str = field(
        default="none",
        metadata={
            "help": "Who ranks: 'simulated' ranks help-desk responses by the gold judge, with a person's errors; 'none' leaves the ranking to people.",
            "choices": ["simulated", "none"],
        },
    )
    num_annotators: int = field(
        default=1,
        metadata={
            "help": "With annotator 'simulated': number of annotators who each rank the responses to a prompt; the help desk has three. See reward's least_pair_agreement."
        },
    )
    seed: int = field(
        default=0, metadata={"help": "Seed of the choice of prompts, the sampling and the annotators."}
    )
    ddp_timeout: int = field(
        default=1800,
        metadata={"help": "Seconds that a process waits for another before it gives the run up."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_responses < 1 or self.batch_size < 1 or self.num_annotators < 1:
            raise UsageError("num_responses, batch_size and num_annotators must be at least 1.")
        if self.annotator == "simulated" and self.num_responses < 2:
            raise UsageError("A ranking needs num_responses of 2 or more.")


DATACLASS_TYPES = (RunArguments, CollectArguments)
