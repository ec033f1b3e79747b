"""Settings, models and data that a training cannot use, refused before compute is spent."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from huggingface_hub import HfApi
from peft import PeftConfig, PeftModel
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tieback.cli.arguments import check_settings
from tieback.cli.errors import UsageError, first_line
from tieback.pipeline.rollout.texts import encode_prompts
from tieback.pipeline.scorers import REWARD_ARGUMENTS
from tieback.pipeline.trainer.config import PPOConfig


def check_args(args: Any) -> None:
    """Check the settings as they are when training is to begin: a field may have been set since they were made.

    Raises:
        UsageError: they are no `PPOConfig`; `check_settings` refuses one; this process has several devices, which
            Transformers would use through DataParallel, without the critic and the bookkeeping of PPO; or the model is to
            be pushed to a hub that cannot be reached.
    """
    if not isinstance(args, PPOConfig):
        raise UsageError(f"args is of type {type(args).__name__}. Give a PPOConfig.")
    check_settings(args)
    if args.n_gpu > 1:
        raise UsageError(
            f"One process sees {args.n_gpu} GPUs. Start one process a GPU with `accelerate launch --config_file "
            "accelerate_configs/multi_gpu.yaml`, or show it a single one with CUDA_VISIBLE_DEVICES=0."
        )
    if args.push_to_hub and args.should_save:
        try:
            HfApi(token=args.hub_token).whoami()
        except Exception as error:  # of the network, of the hub, and of having no token
            raise UsageError(
                f"push_to_hub: the hub cannot be used ({type(error).__name__}: {first_line(error)}). Log in with `hf auth login`, "
                "or leave push_to_hub out."
            ) from error


def check_policy(model: Any, tokenizer: Any, peft_config: Any) -> None:
    """Check that what is to be trained can write, has its tokenizer, and an adapter that PPO can train.

    Raises:
        UsageError: the model is no causal language model, the tokenizer or the adapter's config is something else, or the
            adapter is of virtual tokens.
    """
    if not isinstance(model, PreTrainedModel | PeftModel) or not model.can_generate():
        name = model.__name__ if isinstance(model, type) else type(model).__name__
        raise UsageError(
            f"model is of type {name}. Give a causal language model, one with an adapter of PEFT, or a name or folder."
        )
    if model.config.is_encoder_decoder:
        raise UsageError(
            f"model is of type {type(model).__name__}, an encoder with a decoder. Give a causal model."
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UsageError(
            f"processing_class is of type {type(tokenizer).__name__}. Give the model's tokenizer, such as "
            "AutoTokenizer.from_pretrained(folder)."
        )
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        raise UsageError(
            f"peft_config is of type {type(peft_config).__name__}. Give a PeftConfig, such as LoraConfig()."
        )
    adapter = model.active_peft_config if isinstance(model, PeftModel) else peft_config
    if adapter is not None and adapter.is_prompt_learning:
        raise UsageError(
            f"An adapter of virtual tokens ({adapter.peft_type.value}) cannot be trained: scoring does not put them "
            "before its texts. Use one of another kind, such as LoRA."
        )


def check_dataset(
    name: str, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, args: PPOConfig
) -> None:
    """Check that every row has a prompt, and that prompt and completion fit into the model's context.

    Args:
        name: "train_dataset" or "eval_dataset", for messages.
        dataset: prompt rows.
        tokenizer: the policy's.
        config: the policy's.
        args: settings.

    Raises:
        UsageError: names the row at fault (counted from 1).
    """
    if "prompt" not in dataset.column_names:
        raise UsageError(f"{name} has no `prompt` column; its columns are {dataset.column_names}.")
    if len(dataset) == 0:
        raise UsageError(f"{name} is empty.")
    taken = [column for column in dataset.column_names if column in REWARD_ARGUMENTS]
    if taken:
        raise UsageError(
            f"{name} has a column `{taken[0]}`, but reward functions receive {', '.join(REWARD_ARGUMENTS)} from the "
            "trainer, and the columns beside them. Rename the column."
        )
    for number, prompt in enumerate(dataset["prompt"], start=1):
        try:
            check_prompt(prompt, tokenizer, config.get_text_config(), args)
        except UsageError as error:
            raise UsageError(f"{name}, row {number}: {error}") from error


def check_prompt(
    prompt: Any, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, args: PPOConfig
) -> None:
    """Check one prompt (see `check_dataset`).

    Args:
        prompt: whatever stands in the column.
        tokenizer: the policy's.
        config: of the policy's text model.
        args: settings.

    Raises:
        UsageError: what is wrong, without the row.
    """
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    written = all(isinstance(message, dict) and "role" in message for message in messages)
    text = messages[-1].get("content") if written and messages else None
    if not written or not isinstance(text, str | None):
        raise UsageError(
            f"the prompt is {prompt!r}. Write a text, or a list of messages such as "
            '[{"role": "user", "content": "…"}].'
        )
    if not text or not text.strip():
        raise UsageError("the prompt is empty.")
    try:
        ids = encode_prompts([prompt], tokenizer, args.template_arguments)[0]
    except Exception as error:  # a chat template raises what it likes
        raise UsageError(
            f"the tokenizer cannot read the prompt {prompt!r} ({type(error).__name__}: {error})."
        ) from error
    if not ids:
        raise UsageError(f"the tokenizer makes no token of the prompt {prompt!r}.")
    if max(ids) >= config.vocab_size:
        raise UsageError(
            f"the tokenizer makes the token {max(ids)} of the prompt, but the model's vocabulary has "
            f"{config.vocab_size} tokens: this is not the model's tokenizer."
        )
    if args.max_prompt_length is not None and len(ids) > args.max_prompt_length:
        raise UsageError(
            f"the prompt has {len(ids)} tokens, more than max_prompt_length={args.max_prompt_length}. Leave the row out, "
            "or raise max_prompt_length."
        )
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and len(ids) + args.max_completion_length > context:
        raise UsageError(
            f"the prompt's {len(ids)} tokens and max_completion_length={args.max_completion_length} exceed the model's "
            f"context of {context}. Shorten the prompt, drop the row, or lower max_completion_length."
        )


def check_evaluation(
    args: PPOConfig, sets: Dataset | dict[str, Dataset] | None, figures: Sequence[str]
) -> None:
    """Check that there is something to evaluate on where that is asked for, and a figure to choose the best model by.

    Args:
        args: settings.
        sets: evaluation data, one set or several by name.
        figures: names of the figures of an evaluation.

    Raises:
        UsageError: there is no data, no evaluation for what depends on one, or no figure that is named as
            `metric_for_best_model`.
    """
    evaluates = args.eval_strategy != "no"
    if sets is None and (evaluates or args.eval_on_start):
        asked = f"eval_strategy={args.eval_strategy.value}" if evaluates else "eval_on_start"
        raise UsageError(
            f"{asked} needs evaluation data: give an eval_dataset (the stage: num_eval_prompts)."
        )
    if not evaluates and args.chooses_by_metric:
        raise UsageError(
            "load_best_model_at_end, early_stopping_patience, save_strategy=best and schedules that follow a metric need evaluations during "
            "training: set eval_strategy, with an eval_dataset (the stage: num_eval_prompts)."
        )
    metric = args.metric_for_best_model
    parts = [f"{name}_" for name in sets] if isinstance(sets, dict) else [""]
    known = [part + figure for part in parts for figure in figures]
    if evaluates and metric is not None and metric.removeprefix("eval_") not in known:
        raise UsageError(
            f"metric_for_best_model={metric}: evaluation gives {', '.join(known)}. Name one of these."
        )


def check_train_set(dataset: Dataset | None, args: PPOConfig, processes: int) -> None:
    """Check that the prompts fill at least one iteration; what is left over at the end of an epoch is left out.

    Raises:
        UsageError: there are none, or too few, and Trainer would end without a step.
    """
    if dataset is None:
        raise UsageError("train() needs prompts: give the trainer a train_dataset.")
    taken = args.train_batch_size * processes
    if len(dataset) < taken:
        several = f" / num_generations={args.num_generations}" if args.num_generations > 1 else ""
        raise UsageError(
            f"The training set has {len(dataset)} prompts, but one iteration takes {taken} "
            f"(per_device_train_batch_size={args.per_device_train_batch_size}{several} x {processes} processes). "
            "Lower the batch size or add prompts."
        )
