"""Settings of evaluate."""

from dataclasses import dataclass, field

from tieback.cli.errors import UsageError
from tieback.pipeline.arguments import RunArguments
from tieback.pipeline.rollout.settings import RolloutSettings


@dataclass
class EvaluateArguments(RolloutSettings):
    """Policies that are compared, the prompts, and who judges.

    The rollout settings are those that the PPO policy was trained with, except where the recipe or the command line
    of this stage names others.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Source of the prompts: helpdesk (the built-in world), a local file (JSON, JSONL, CSV, Parquet), or a hub data set; preference data and demonstrations give their prompts."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_test_split: str = field(
        default="test",
        metadata={
            "help": "Split that no other stage has read. A file has none: leave its end to this stage ('train[90%%:]') and its beginning to the others ('train[:90%%]')."
        },
    )
    num_prompts: int = field(
        default=300, metadata={"help": "Most prompts; where there are more, they are drawn with the seed."}
    )
    sft_model_path: str | None = field(
        default=None, metadata={"help": "SFT model; <run_dir>/sft where not set."}
    )
    ppo_model_path: str | None = field(
        default=None, metadata={"help": "PPO policy; <run_dir>/ppo where not set."}
    )
    reward_model_path: str | None = field(
        default=None,
        metadata={"help": "Reward model; <run_dir>/reward where not set; 'none' to go without one."},
    )
    gold_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Functions (module:function) or reward models (folder or hub name; {run_dir} for this run's folder) whose sum is the gold score."
        },
    )
    batch_size: int = field(
        default=64, metadata={"help": "Number of prompts of a process in one forward pass."}
    )
    dtype: str = field(
        default="float32", metadata={"help": "Type of the policies' weights: float32, bfloat16 or auto."}
    )
    num_resamples: int = field(
        default=10_000, metadata={"help": "Number of resamples of the bootstrap; 2,000 or more."}
    )
    num_examples: int = field(
        default=12, metadata={"help": "Number of pairs, drawn at random, that the page shows."}
    )
    best_of: int = field(
        default=0,
        metadata={
            "help": "Number of SFT's responses to each prompt among which the reward model chooses the best, for the frontier that the page compares PPO with; 0 for none."
        },
    )
    pong_dir: str = field(
        default="runs/pong",
        metadata={
            "help": "Folder of a Pong run whose curves the page shows beside this run's, if it exists."
        },
    )
    seed: int = field(
        default=0, metadata={"help": "Seed of the choice of prompts, the sampling and the bootstrap."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of the results; <run_dir>/evaluate where not set."}
    )
    ddp_timeout: int = field(
        default=1800,
        metadata={"help": "Seconds that a process waits for another before it gives the run up."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"num_prompts": 1, "batch_size": 1, "num_examples": 0, "best_of": 0, "num_resamples": 2000}
        for name, limit in least.items():
            if getattr(self, name) < limit:
                raise UsageError(f"{name} must be at least {limit}, not {getattr(self, name)}.")


DATACLASS_TYPES = (RunArguments, EvaluateArguments)
