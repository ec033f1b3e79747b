"""Settings of PPO, beside those of its trainer."""

from dataclasses import dataclass, field

from trl import ModelConfig

from tieback.pipeline.arguments import RunArguments
from tieback.pipeline.trainer.config import PPOConfig


@dataclass
class PPOArguments:
    """Prompts, rewards and critic."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Source of the prompts: helpdesk (the built-in world), a local file (JSON, JSONL, CSV, Parquet), or a hub data set; preference data and demonstrations give their prompts."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of the data set."})
    max_rows: int | None = field(
        default=None, metadata={"help": "Most prompts that are read; of helpdesk, how many are made."}
    )
    num_eval_prompts: int = field(
        default=0,
        metadata={"help": "Number of prompts held out for evaluation during training; 0 for none."},
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward models (folder or hub name; {run_dir} for this run's folder), reward functions (module:function) and reward servers (http://…, https://…); <run_dir>/reward where not set."
        },
    )
    judge_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward models and functions, named as in reward_funcs, that score evaluations during training and take no part in it: a second opinion on what the reward has become. metric_for_best_model: judge/mean chooses by them."
        },
    )
    rollout_func: str | None = field(
        default=None,
        metadata={
            "help": "Function (module:function) that samples in the trainer's place, in several turns with an environment between them (docs/multi_turn.md)."
        },
    )
    ptx_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Source of the texts that ptx_coef imitates: helpdesk, a local file, or a hub data set, with demonstrations as SFT takes them."
        },
    )
    ptx_max_rows: int | None = field(
        default=None, metadata={"help": "Most of those texts that are read; of helpdesk, how many are made."}
    )
    critic_init: str = field(
        default="reward",
        metadata={
            "help": "Model that the critic starts from, unless value_model names one: 'reward' (the first reward model) or 'policy'."
        },
    )
    value_model: str | None = field(
        default=None,
        metadata={
            "help": "Folder or hub name of a model that the critic starts from: a causal reward model, or another run's ppo/value_model."
        },
    )

    def __post_init__(self) -> None:
        if self.num_eval_prompts < 0:
            raise ValueError(f"num_eval_prompts must be at least 0, got {self.num_eval_prompts}.")
        if self.critic_init not in ("reward", "policy"):
            raise ValueError(f"critic_init must be 'reward' or 'policy', got {self.critic_init!r}.")


DATACLASS_TYPES = (RunArguments, PPOArguments, PPOConfig, ModelConfig)
