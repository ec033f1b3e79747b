"""PPO: the SFT model learns to score higher with a reward model, held near itself by a KL penalty.

Trains `tieback.PPOTrainer`. Rewards come from reward models and from functions of one's own
(`reward_funcs`), weighted by `reward_weights`; the critic starts from the reward model or from the policy
(`critic_init`). LoRA through TRL's `ModelConfig`: policy, reference, critic and a reward model of the same base are then
adapters that take turns on it (`critic`).

    accelerate launch pipeline/ppo.py
    accelerate launch pipeline/ppo.py --reward_funcs my_rewards:politeness runs/helpdesk/reward --reward_weights 0.5 1

An interrupted run (ctrl-C, or a kill) goes on from its last whole checkpoint when it is started again. Writes the
policy (safetensors; the adapter alone for LoRA) with its tokenizer, the critic in `value_model/`, trainer_state.json
with every curve, and metrics.json into `<run_dir>/ppo`.
"""

if __name__ == "__main__":
    from tieback.pipeline.help import print_help_if_asked

    print_help_if_asked("ppo")  # before the imports of a run

import time
from collections.abc import Collection
from pathlib import Path
from statistics import fmean
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel
from trl import ModelConfig

from tieback.cli.errors import UsageError, run
from tieback.data.sources import load_rows
from tieback.pipeline.arguments import RunArguments, parse_stage
from tieback.pipeline.finished import is_finished
from tieback.pipeline.hub import claim_repository, publish
from tieback.pipeline.interruption import exit_if_interrupted
from tieback.pipeline.model_card import write_card
from tieback.pipeline.model_loading import (
    context_length,
    load_adapted_policy,
    load_policy,
    load_tokenizer,
    new_adapter,
)
from tieback.pipeline.progress import FirstStep
from tieback.pipeline.prompts import load_prompts
from tieback.pipeline.pypi_models import folder_of
from tieback.pipeline.resume import checkpoint_to_resume
from tieback.pipeline.rollout.token_scores import base_model
from tieback.pipeline.scorers import Scorer, load_scorer
from tieback.pipeline.settings.ppo import DATACLASS_TYPES, PPOArguments
from tieback.pipeline.stage import finish_stage, quiet_libraries
from tieback.pipeline.trainer import PPOConfig, PPOTrainer
from tieback.pipeline.trainer.checkpoints import STATE_FILE
from tieback.pipeline.trainer.models import CriticSource, base_of_adapter
from tieback.reward_model.adapter import base_of
from tieback.reward_model.scoring import RewardScorer

PEAK = "memory/peak"
# Iterations over which metrics.json averages the end of the run.
LAST = 10


def main() -> None:
    """Run the stage."""
    quiet_libraries()
    run, ppo_args, args, model_args = parse_stage("ppo", DATACLASS_TYPES)
    started = time.perf_counter()
    repository = claim_repository(args, run.recipe)
    trainer, num_left_out = make_trainer(run, ppo_args, args, model_args)
    first_step = FirstStep()
    trainer.add_callback(first_step)
    settings = run.recipe | {"digests": trainer.inputs}
    if is_finished(args.output_dir, settings, run.overwrite, args.resume_from_checkpoint):
        publish(repository, args.output_dir)
        return
    resume = checkpoint_to_resume(
        args.output_dir, args.resume_from_checkpoint, settings, trainer.check_resume, STATE_FILE
    )
    trainer.train(resume_from_checkpoint=resume)
    exit_if_interrupted(trainer, trainer.interrupt)
    trainer.save_model()
    trainer.save_state()
    metrics = last_metrics(trainer.state.log_history)
    metrics |= {
        "num_prompts/train": len(trainer.train_dataset),
        "num_prompts/left_out": num_left_out,
        **({"num_demonstrations/ptx": len(trainer.ptx.texts)} if trainer.ptx.texts else {}),
        "train/iterations": trainer.state.global_step,
        "train/seconds": time.perf_counter() - started,
        **first_step.figures(),
    }
    write_card("ppo", Path(args.output_dir), metrics, settings, model_args.model_name_or_path)
    finish_stage("ppo", args.output_dir, metrics, settings)
    publish(repository, args.output_dir)
    trainer.accelerator.wait_for_everyone()


def make_trainer(
    run: RunArguments, ppo_args: PPOArguments, args: PPOConfig, model_args: ModelConfig
) -> tuple[PPOTrainer, int]:
    """Load what the settings name.

    Returns:
        The trainer, and how many prompts were left out for their length; `model_args` then names the model's folder.

    Raises:
        UsageError: something is missing, or cannot be used.
    """
    if model_args.model_name_or_path is None:
        run.require("sft", "config.json" if not model_args.use_peft else "")
        model_args.model_name_or_path = str(run.stage_dir("sft"))
    model_args.model_name_or_path = folder_of(model_args.model_name_or_path)
    tokenizer = load_tokenizer(model_args.model_name_or_path, model_args.model_revision)
    policy, peft_config = load_start(model_args, tokenizer, run.recipe)
    base = base_of_adapter(policy, peft_config)
    names = reward_names(ppo_args, run)
    rewards = [load_scorer(name, args.per_device_eval_batch_size, base=base) for name in names]
    judges = [
        load_scorer(folder_of(run.within(name)), args.per_device_eval_batch_size, setting="judge_funcs")
        for name in ppo_args.judge_funcs or []
    ]
    prompts, counts = load_prompts(
        "ppo",
        ppo_args.dataset_name,
        tokenizer,
        context_length(base_model(policy)),
        args,
        split=ppo_args.dataset_train_split,
        config=ppo_args.dataset_config,
        max_rows=ppo_args.max_rows,
        seed=args.seed,
    )
    train, evaluation = hold_out(prompts, ppo_args.num_eval_prompts)
    if evaluation is None:
        args.eval_strategy = "no"

    trainer = PPOTrainer(
        model=policy,
        reward_funcs=rewards,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        value_model=critic_to_start_from(ppo_args, rewards),
        peft_config=peft_config,
        judge_funcs=judges or None,
        ptx_dataset=load_ptx(ppo_args, args.seed),
        rollout_func=ppo_args.rollout_func,
    )
    return trainer, counts["left_out"]


def load_ptx(ppo_args: PPOArguments, seed: int) -> Dataset | None:
    """The texts that are imitated; None where none are named."""
    if ppo_args.ptx_dataset_name is None:
        return None
    return load_rows(
        ppo_args.ptx_dataset_name, "demonstrations", max_rows=ppo_args.ptx_max_rows, seed=seed
    ).dataset


def load_start(
    model_args: ModelConfig, tokenizer: Any, named: Collection[str]
) -> tuple[PreTrainedModel | PeftModel, PeftConfig | None]:
    """The model to tune, and the new adapter to tune it with, if any.

    With use_peft an adapter of the SFT stage goes on being trained, on its own base; without it is merged.
    """
    path = model_args.model_name_or_path
    if model_args.use_peft and base_of(path) is not None:
        return load_adapted_policy(path, tokenizer, model_args, named), None
    policy = load_policy(path, tokenizer, model_args)
    return policy, new_adapter(model_args, policy)


def reward_names(ppo_args: PPOArguments, run: RunArguments) -> list[str]:
    """Names of the rewards: those asked for, or this run's reward model."""
    if ppo_args.reward_funcs:
        return [folder_of(run.within(name)) for name in ppo_args.reward_funcs]
    run.require("reward", "config.json")
    return [str(run.stage_dir("reward"))]


def critic_to_start_from(ppo_args: PPOArguments, rewards: list[Scorer]) -> CriticSource:
    """The model that is named, the first reward model, or None for the policy's own backbone, or adapter, with a new head.

    Raises:
        UsageError: the reward model is asked for, and there is none.
    """
    if ppo_args.value_model is not None:
        return folder_of(ppo_args.value_model)
    if ppo_args.critic_init == "policy":
        return None
    models = [reward.model for reward in rewards if isinstance(reward, RewardScorer)]
    if not models:
        raise UsageError(
            "critic_init is 'reward', but reward_funcs names no reward model: set critic_init to 'policy'."
        )
    return models[0]


def hold_out(prompts: Dataset, count: int) -> tuple[Dataset, Dataset | None]:
    """Prompts to train on, and the last `count` to evaluate on during training; None for none.

    Raises:
        UsageError: none would be left to train on.
    """
    if count == 0:
        return prompts, None
    if len(prompts) <= count:
        raise UsageError(f"num_eval_prompts={count} leaves none of {len(prompts)} prompts to train on.")
    first = len(prompts) - count
    return prompts.select(range(first)), prompts.select(range(first, len(prompts)))


def last_metrics(log_history: list[dict[str, Any]]) -> dict[str, float]:
    """Means of the training metrics over the last iterations that were logged, of those that have them; memory's peak is the greatest."""
    entries = [entry for entry in log_history if "policy/loss" in entry][-LAST:]
    names = (
        [name for name in entries[-1] if "/" in name or name in ("kl_coef", "grad_norm", "tokens_per_second")]
        if entries
        else []
    )
    values = {name: [entry[name] for entry in entries if name in entry] for name in names}
    return {name: max(of) if name == PEAK else fmean(of) for name, of in values.items()}


if __name__ == "__main__":
    run(main)
