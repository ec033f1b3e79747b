"""PPO: the SFT model learns to score higher with a reward model, held near itself by a KL penalty.

Trains `tieback.PPOTrainer`. Rewards come from reward models and from functions of one's own
(`reward_funcs`), weighted by `reward_weights`; the critic starts from the reward model or from the policy
(`critic_init`). LoRA through TRL's `ModelConfig`: the reference is then the policy with its adapter off.

    accelerate launch pipeline/ppo.py
    accelerate launch pipeline/ppo.py --reward_funcs my_rewards:politeness runs/helpdesk/reward --reward_weights 0.5 1

An interrupted run (ctrl-C, or a kill) goes on from its last whole checkpoint when it is started again. Writes the
policy (safetensors; the adapter alone for LoRA) with its tokenizer, the critic in `value_model/`, trainer_state.json
with every curve, and metrics.json into `<run_dir>/ppo`.
"""

import importlib
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel
from trl import ModelConfig, get_peft_config

from tieback.cli.errors import UsageError, run
from tieback.data.sources import load_rows
from tieback.pipeline.arguments import RunArguments, parse_stage
from tieback.pipeline.interruption import exit_if_interrupted
from tieback.pipeline.model_loading import context_length, load_policy, load_tokenizer
from tieback.pipeline.prompt_lengths import fit_prompts
from tieback.pipeline.resume import checkpoint_to_resume
from tieback.pipeline.stage import begin_stage, finish_stage
from tieback.pipeline.trainer import PPOConfig, PPOTrainer
from tieback.pipeline.trainer.checkpoints import STATE_FILE
from tieback.reward_model.head import load_reward_model
from tieback.reward_model.scoring import RewardScorer

# Iterations over which metrics.json averages the end of the run.
LAST = 10


@dataclass
class PPOArguments:
    """Prompts, rewards and critic.

    Args:
        dataset_name: "helpdesk", a local file (JSON, JSONL, CSV, Parquet), or a hub data set; preference data and
            demonstrations give their prompts.
        dataset_config: configuration of a hub data set.
        dataset_train_split: its split.
        max_rows: prompts at most (for the built-in world: how many are made).
        max_prompt_length: longer prompts (in tokens) are left out and counted; refused where not set.
        num_eval_prompts: prompts held out for evaluate() during training; 0 for none.
        reward_funcs: reward models (folder or hub name) and functions (`module:function`).
        critic_init: what the critic starts from.
    """

    dataset_name: str | None = field(
        default=None, metadata={"help": "helpdesk, a local file, or a hub data set."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of the data set."})
    max_rows: int | None = field(default=None, metadata={"help": "Prompts at most."})
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Prompts with more tokens are left out; where not set they are an error."},
    )
    num_eval_prompts: int = field(
        default=0, metadata={"help": "Prompts held out for evaluation during training."}
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward models (folder or hub name) and functions (module:function); <run_dir>/reward where not set."
        },
    )
    critic_init: str = field(
        default="reward",
        metadata={"help": "What the critic starts from: 'reward' (the first reward model) or 'policy'."},
    )

    def __post_init__(self) -> None:
        if self.critic_init not in ("reward", "policy"):
            raise ValueError(f"critic_init must be 'reward' or 'policy', got {self.critic_init!r}.")


def main() -> None:
    """Run the stage."""
    begin_stage("ppo")
    run, ppo_args, args, model_args = parse_stage("ppo", (RunArguments, PPOArguments, PPOConfig, ModelConfig))
    started = time.perf_counter()
    if model_args.model_name_or_path is None:
        run.require("sft", "config.json" if not model_args.use_peft else "")
        model_args.model_name_or_path = str(run.stage_dir("sft"))
    tokenizer = load_tokenizer(model_args.model_name_or_path, model_args.model_revision)
    policy = load_base_policy(model_args, tokenizer, args.output_dir)
    rewards = [load_reward(name, args.per_device_eval_batch_size) for name in reward_names(ppo_args, run)]
    train, evaluation, left_out = load_prompts(ppo_args, policy, tokenizer, args)
    if evaluation is None:
        args.eval_strategy = "no"

    trainer = PPOTrainer(
        model=policy,
        reward_funcs=rewards,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        value_model=critic_to_start_from(ppo_args.critic_init, rewards),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(
        resume_from_checkpoint=checkpoint_to_resume(
            args.output_dir, args.resume_from_checkpoint, run.recipe, STATE_FILE
        )
    )
    exit_if_interrupted(trainer, trainer.interrupt)
    trainer.save_model()
    trainer.save_state()
    metrics = last_metrics(trainer.state.log_history)
    metrics |= {
        "num_prompts/train": len(train),
        "num_prompts/left_out": left_out,
        "train/iterations": trainer.state.global_step,
        "train/seconds": time.perf_counter() - started,
    }
    finish_stage("ppo", args.output_dir, metrics, run.recipe)
    trainer.end()


def load_base_policy(model_args: ModelConfig, tokenizer: Any, output_dir: str) -> PreTrainedModel:
    """The model to tune, with an adapter of the SFT stage merged in.

    A new adapter on a merged model needs that model on disk to be loaded with later: it is kept in
    `<output_dir>/base_model`.
    """
    path = model_args.model_name_or_path
    policy = load_policy(path, tokenizer, model_args)
    if model_args.use_peft and Path(path, "adapter_config.json").is_file():
        base = Path(output_dir, "base_model")
        if PartialState().is_main_process:
            policy.save_pretrained(base)
            tokenizer.save_pretrained(base)
        policy.name_or_path = str(base)
    return policy


def reward_names(ppo_args: PPOArguments, run: RunArguments) -> list[str]:
    """Names of the rewards: those asked for, or this run's reward model."""
    if ppo_args.reward_funcs:
        return ppo_args.reward_funcs
    run.require("reward", "config.json")
    return [str(run.stage_dir("reward"))]


def load_reward(name: str, batch_size: int, setting: str = "reward_funcs") -> Any:
    """A reward function `module:function`, or the reward model in a folder or on the hub.

    `setting` is the one that named it, for messages.

    Raises:
        UsageError: it cannot be found, or is no reward model.
    """
    if ":" in name and not Path(name).exists():
        module_name, _, attribute = name.partition(":")
        sys.path.insert(0, os.getcwd())
        try:
            return getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise UsageError(
                f"{setting}: {name} cannot be imported ({error}). Write module:function."
            ) from error
        finally:
            sys.path.pop(0)
    try:
        return RewardScorer(load_reward_model(name), load_tokenizer(name), batch_size, name=Path(name).name)
    except OSError as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(f"{setting}: no reward model can be loaded from {name}: {reason}") from error
    except UsageError as error:
        raise UsageError(f"{setting}: {error}") from error


def critic_to_start_from(critic_init: str, rewards: list[Any]) -> PreTrainedModel | None:
    """The first reward model, or None for the policy's own backbone with a new head.

    Raises:
        UsageError: the reward model is asked for, and there is none.
    """
    if critic_init == "policy":
        return None
    models = [reward.model for reward in rewards if isinstance(reward, RewardScorer)]
    if not models:
        raise UsageError(
            "critic_init is 'reward', but reward_funcs names no reward model: set critic_init to 'policy'."
        )
    return models[0]


def load_prompts(
    ppo_args: PPOArguments, policy: PreTrainedModel, tokenizer: Any, args: PPOConfig
) -> tuple[Dataset, Dataset | None, int]:
    """Prompts to train on, prompts to evaluate on, and how many were left out for their length.

    Raises:
        UsageError: no data set is named, or too few prompts are in it.
    """
    if ppo_args.dataset_name is None:
        raise UsageError(
            "Name the prompts with --dataset_name (or `make ppo DATA=...`): a file, or a hub data set."
        )
    rows = load_rows(
        ppo_args.dataset_name,
        "prompts",
        split=ppo_args.dataset_train_split,
        config=ppo_args.dataset_config,
        max_rows=ppo_args.max_rows,
        seed=args.seed,
    ).dataset
    rows, left_out = fit_prompts(
        rows, tokenizer, context_length(policy), args.max_completion_length, ppo_args.max_prompt_length
    )
    if ppo_args.num_eval_prompts == 0:
        return rows, None, left_out
    if len(rows) <= ppo_args.num_eval_prompts:
        raise UsageError(
            f"num_eval_prompts={ppo_args.num_eval_prompts} leaves none of {len(rows)} prompts to train on."
        )
    first = len(rows) - ppo_args.num_eval_prompts
    return rows.select(range(first)), rows.select(range(first, len(rows))), left_out


def last_metrics(log_history: list[dict[str, Any]]) -> dict[str, float]:
    """Means of the training metrics over the last iterations that were logged."""
    entries = [entry for entry in log_history if "policy/loss" in entry][-LAST:]
    names = (
        [name for name in entries[-1] if "/" in name or name in ("kl_coef", "grad_norm")] if entries else []
    )
    return {name: sum(entry[name] for entry in entries if name in entry) / len(entries) for name in names}


if __name__ == "__main__":
    run(main)
