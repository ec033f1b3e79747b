"""PPOConfig: training arguments, PPO hyperparameters, rollout settings, and what PPO on a language model adds."""

import math
from dataclasses import dataclass, field
from typing import Any, cast

from transformers import GenerationConfig, TrainingArguments

from tieback.pipeline.resume import ResumeSettings
from tieback.pipeline.rollout.settings import RolloutSettings, read_mapping
from tieback.pipeline.trainer.imitation_settings import ImitationSettings
from tieback.pipeline.trainer.reward_settings import RewardSettings
from tieback.pipeline.trainer.setting_checks import (
    check_available,
    check_launched,
    check_numbers,
    check_supported,
)
from tieback.ppo_core import PPOHyperparameters

# Scoring divides the logits by the temperature and by nothing else: a setting of generation that changes the sampling
# distribution in another way would make the probability ratio differ from 1 before the first step. These change speed
# and memory alone.
HARMLESS_GENERATION_SETTINGS = (
    "use_cache",
    "cache_implementation",
    "cache_config",
    "max_cache_len",
    "compile_config",
    "disable_compile",
    "prefill_chunk_size",
    "low_memory",
)
# Schedules that step after an evaluation, by its figure.
SCHEDULES_ON_A_METRIC = ("reduce_lr_on_plateau", "greedy")
SETTINGS_WITH_A_FIELD = {
    "temperature": "temperature",
    "max_new_tokens": "max_completion_length",
    "max_length": "max_completion_length",
    "eos_token_id": "stop_tokens",
    "stop_strings": "stop_tokens",
}


@dataclass
class PPOConfig(
    PPOHyperparameters, RolloutSettings, RewardSettings, ImitationSettings, ResumeSettings, TrainingArguments
):
    """Settings of `PPOTrainer`.

    One Trainer step is one PPO iteration: `max_steps` counts iterations, `per_device_train_batch_size` is the
    number of completions that each process samples for an iteration (`num_generations` for each prompt), and
    `learning_rate` is scheduled once an iteration.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "generation_kwargs"]  # noqa: RUF012

    learning_rate: float = field(
        default=3e-6,
        metadata={
            "help": "Learning rate of the policy (and of the critic, unless critic_learning_rate is set)."
        },
    )
    critic_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the critic; the policy's where not set."}
    )
    critic: str | None = field(
        default=None,
        metadata={
            "help": "Kind of critic: separate (a whole model of its own), adapter (an adapter and a head on the policy's base), or shared (a head on the policy's own states). Where not set: adapter for a policy with an adapter, unless the critic starts from a whole model; separate otherwise.",
            "choices": ["separate", "adapter", "shared"],
        },
    )
    critic_warmup_iterations: int = field(
        default=0, metadata={"help": "First iterations in which only the critic learns."}
    )
    critic_warmup_patience: int | None = field(
        default=None,
        metadata={
            "help": "End that warm-up sooner: when value/explained_variance has not risen by more than 0.01 for so many iterations."
        },
    )
    extra_critic_epochs: int = field(
        default=0,
        metadata={
            "help": "Further passes over each rollout, after those of num_ppo_epochs, in which only the critic learns."
        },
    )
    adam_epsilon: float = field(
        default=1e-5, metadata={"help": "Epsilon of Adam (1e-5 in InstructGPT's and OpenAI's PPO)."}
    )
    per_device_train_batch_size: int = field(
        default=64, metadata={"help": "Completions a process samples for one iteration."}
    )
    num_generations: int = field(
        default=1,
        metadata={
            "help": "Completions of each prompt in an iteration, all on one process: per_device_train_batch_size / num_generations prompts a process."
        },
    )
    dynamic_sampling_batches: int = field(
        default=1,
        metadata={
            "help": "Most batches of prompts that are sampled for an iteration, where completions of a prompt (num_generations above 1) are all scored alike: others take its place, drawn at random."
        },
    )
    per_device_eval_batch_size: int = field(
        default=64, metadata={"help": "Prompts a process completes at a time in evaluate()."}
    )
    micro_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Most sequences in one forward or backward pass, like lengths together; changes memory and speed, not results. As many as make up 8,192 tokens (1,024 on a CPU), padding included, where not set."
        },
    )
    generation_batch_size: int | None = field(
        default=None,
        metadata={"help": "Sequences generated at a time by a process; all of its batch where not set."},
    )
    generation_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Further arguments of generate(), as JSON, e.g. \'{"cache_implementation": "static"}\'. Those that change the sampling distribution are refused.'
        },
    )
    critic_gae_lambda: float | None = field(
        default=None,
        metadata={"help": "λ of the critic's returns, where another than that of the policy's advantages."},
    )
    gae_lambda_alpha: float | None = field(
        default=None,
        metadata={
            "help": "Makes λ of the policy's advantages depend on the number l of a completion's tokens: 1 - 1 / (gae_lambda_alpha * l), at least 0, in place of gae_lambda; 0.05 in VAPO. Not set: gae_lambda for all."
        },
    )
    importance_sampling: str | None = field(
        default=None,
        metadata={
            "help": "Correct the policy's loss for what the sampler's probabilities differ from those of scoring: by token or by sequence. Not set: no correction. With sampler transformers, generate then holds the logits of all sampled tokens.",
            "choices": ["token", "sequence"],
        },
    )
    importance_sampling_cap: float = field(
        default=2.0, metadata={"help": "Greatest weight of importance_sampling."}
    )
    disable_dropout: bool = field(
        default=True,
        metadata={
            "help": "Turn dropout off in all models, without which the ratio is not 1 before the first step."
        },
    )
    check_sampling: bool = field(
        default=True,
        metadata={
            "help": "Before the first iteration, sample up to 32 tokens for four prompts and compare the probabilities that they were drawn from with those of scoring."
        },
    )
    replicate_frozen_models: bool = field(
        default=False,
        metadata={
            "help": "Hold reference and reward models whole on each process under FSDP 2 and ZeRO-3, which saves communication and costs memory; they are sharded like the policy where not set."
        },
    )
    rollout_timeout: float | None = field(
        default=3600.0,
        metadata={
            "help": "Most seconds for the sampler, and for the reward functions, to answer with what they are asked for at once; then the run ends with a checkpoint. null for no limit."
        },
    )
    rollout_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder that the tokens of each iteration are written to, with their log-probabilities, values, rewards and advantages, for `tieback replay`; nowhere where not set. It takes about 35 bytes a token, as many in each row as in the longest, and the texts."
        },
    )
    log_completions: bool = field(
        default=False, metadata={"help": "Print a table of completions whenever metrics are logged."}
    )
    num_completions_to_print: int = field(
        default=4, metadata={"help": "Completions shown: of that table, and in TensorBoard."}
    )

    # Defaults of Trainer that suit PPO.
    logging_steps: float = field(default=1, metadata={"help": "Iterations between two log lines."})
    lr_scheduler_type: str = field(
        default="linear", metadata={"help": "Schedule of the learning rates over the iterations."}
    )
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further arguments of the schedule, as JSON."}
    )
    metric_for_best_model: str | None = field(
        default=None,
        metadata={
            "help": "Figure of evaluation that the best checkpoint is chosen by, or a schedule follows, such as reward/mean (where not set) or, of several data sets, <name>_reward/mean."
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "End the training where metric_for_best_model has not become better for so many evaluations; load_best_model_at_end then brings back the best policy. Never where not set."
        },
    )
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Leave out the last, smaller batch of an epoch."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Reward functions read the columns, so they are kept."}
    )
    report_to: None | str | list[str] = field(  # noqa: RUF036 -- the order that TrlParser reads
        default="tensorboard", metadata={"help": "Trackers: tensorboard, wandb, trackio, none."}
    )

    data_seed: int | None = field(
        default=None, metadata={"help": "Seed of the order of prompts; `seed` where not set."}
    )

    def __post_init__(self) -> None:
        """Check the settings before any model is loaded.

        Raises:
            ValueError: a setting is out of range, or is one that this trainer cannot honour.
        """
        check_numbers(self)
        check_launched(self)
        read_mapping("generation_kwargs", self.generation_kwargs)
        for name in self._VALID_DICT_FIELDS:
            value = getattr(self, name)
            if isinstance(value, str) and value.startswith("{"):
                read_mapping(name, value)
        if self.metric_for_best_model is None and self.chooses_by_metric:
            # Trainer would take a loss, which evaluation does not have.
            self.metric_for_best_model = "reward/mean"
        super().__post_init__()
        if self.lr_scheduler_type in SCHEDULES_ON_A_METRIC:
            # PyTorch would wait for a smaller figure.
            mode = "max" if self.greater_is_better else "min"
            self.lr_scheduler_kwargs = {"mode": mode} | cast(dict[str, Any], self.lr_scheduler_kwargs or {})
        if self.early_stopping_patience is not None:
            # Or a resumed run would count anew.
            self.restore_callback_states_from_checkpoint = True
        check_supported(self)
        check_available(self)
        if self.data_seed is None:
            self.data_seed = self.seed
        if self.importance_sampling not in (None, "token", "sequence"):
            raise ValueError(
                f"importance_sampling must be token, sequence or not set, got {self.importance_sampling!r}."
            )
        self._check_algorithm()
        if self.critic not in (None, "separate", "adapter", "shared"):
            raise ValueError(f"critic must be separate, adapter or shared, got {self.critic!r}.")
        for name in (
            "critic_warmup_iterations",
            "extra_critic_epochs",
            "num_completions_to_print",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, got {getattr(self, name)}.")
        for name in (
            "per_device_train_batch_size",
            "num_generations",
            "dynamic_sampling_batches",
            "per_device_eval_batch_size",
            "micro_batch_size",
            "generation_batch_size",
            "early_stopping_patience",
            "critic_warmup_patience",
            "gae_lambda_alpha",
            "importance_sampling_cap",
            "critic_learning_rate",
            "rollout_timeout",
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {value}.")
        if self.critic_warmup_iterations and self.vf_coef == 0:
            raise ValueError(
                f"critic_warmup_iterations={self.critic_warmup_iterations} trains the critic alone, but vf_coef is 0: "
                "nothing would be learnt. Raise vf_coef, or leave the warm-up out."
            )
        self._check_generation_kwargs()
        self._check_batch_sizes()

    @property
    def train_batch_size(self) -> int:
        """Prompts that a process draws for an iteration: what Trainer makes its batches of."""
        return self.per_device_train_batch_size // self.num_generations

    @property
    def chooses_by_metric(self) -> bool:
        """Whether checkpoints or learning rates depend on a figure of evaluation."""
        follows = self.lr_scheduler_type in SCHEDULES_ON_A_METRIC
        stops = self.early_stopping_patience is not None
        return follows or stops or self.load_best_model_at_end or self.save_strategy == "best"

    @property
    def generation_arguments(self) -> dict[str, Any]:
        """`generation_kwargs`, of which TrainingArguments has parsed the JSON."""
        return cast(dict[str, Any], self.generation_kwargs or {})

    def _check_algorithm(self) -> None:
        if self.dynamic_sampling_batches > 1 and self.num_generations == 1:
            raise ValueError(
                f"dynamic_sampling_batches={self.dynamic_sampling_batches} replaces prompts whose completions are scored alike, "
                "but there is one of each: set num_generations to 2 or more."
            )
        if self.critic_gae_lambda is not None and not 0 <= self.critic_gae_lambda <= 1:
            raise ValueError(f"critic_gae_lambda must be between 0 and 1, got {self.critic_gae_lambda}.")
        if self.extra_critic_epochs and self.vf_coef == 0:
            raise ValueError(
                "extra_critic_epochs trains the critic alone, but vf_coef is 0: nothing would be learnt."
            )
        if self.critic_warmup_patience is not None and not self.critic_warmup_iterations:
            raise ValueError(
                "critic_warmup_patience ends a warm-up sooner, but critic_warmup_iterations is 0: set that to the most iterations."
            )
        if self.overlong_buffer_length is None:
            return
        if self.truncation != "penalty":
            raise ValueError(
                f"overlong_buffer_length spreads missing_eos_penalty, which truncation={self.truncation} does not charge."
            )
        if self.overlong_buffer_length > self.max_completion_length:
            raise ValueError(
                f"overlong_buffer_length={self.overlong_buffer_length} is more than "
                f"max_completion_length={self.max_completion_length}."
            )

    def _check_generation_kwargs(self) -> None:
        for name in self.generation_kwargs or {}:
            if name in SETTINGS_WITH_A_FIELD:
                raise ValueError(
                    f"generation_kwargs: set `{SETTINGS_WITH_A_FIELD[name]}` instead of `{name}`."
                )
            if name not in HARMLESS_GENERATION_SETTINGS:
                raise ValueError(
                    f"generation_kwargs: `{name}` is refused. Scoring does not know of settings that change what is "
                    "sampled, so the probability ratio would not be 1 before the first step. Only speed and memory "
                    f"may be set here: {', '.join(HARMLESS_GENERATION_SETTINGS)}."
                )
        try:
            GenerationConfig(**self.generation_arguments)
        except (TypeError, ValueError) as error:
            raise ValueError(f"generation_kwargs: {error}") from error

    def _check_batch_sizes(self) -> None:
        local = self.per_device_train_batch_size
        if local % self.num_generations:
            raise ValueError(
                f"per_device_train_batch_size={local} completions do not divide into num_generations="
                f"{self.num_generations} of each prompt."
            )
        if local * self.world_size % self.num_minibatches:
            raise ValueError(
                f"{local * self.world_size} completions an iteration (per_device_train_batch_size={local} x "
                f"{self.world_size} processes) do not divide into num_minibatches={self.num_minibatches}."
            )
        minibatch = local * self.world_size // self.num_minibatches
        if self.micro_batch_size is not None and minibatch % self.micro_batch_size:
            raise ValueError(
                f"A minibatch of {minibatch} completions (per_device_train_batch_size={local} x {self.world_size} "
                f"processes / num_minibatches={self.num_minibatches}) does not divide into "
                f"micro_batch_size={self.micro_batch_size}."
            )
        if self.generation_batch_size is not None and local % self.generation_batch_size:
            raise ValueError(
                f"per_device_train_batch_size={local} does not divide into "
                f"generation_batch_size={self.generation_batch_size}."
            )
