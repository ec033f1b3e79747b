"""Devices and data that a training cannot use, refused before compute is spent."""

from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from tieback.cli.errors import UsageError
from tieback.pipeline.rollout.texts import encode_prompts
from tieback.pipeline.trainer.config import PPOConfig

# What a reward function is called with besides the columns of the data.
REWARD_ARGUMENTS = ("prompts", "completions", "completion_ids")


def check_devices(num_devices: int) -> None:
    """Check that one process has one device.

    Raises:
        UsageError: it has more, which Transformers would use through DataParallel, without the critic and the
            bookkeeping of PPO.
    """
    if num_devices > 1:
        raise UsageError(
            f"One process sees {num_devices} GPUs. Start one process a GPU with `accelerate launch --config_file "
            "accelerate_configs/multi_gpu.yaml`, or show it a single one with CUDA_VISIBLE_DEVICES=0."
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
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    for number, prompt in enumerate(dataset["prompt"], start=1):
        text = prompt if isinstance(prompt, str) else prompt[-1].get("content") if prompt else ""
        if not isinstance(text, str) or not text.strip():
            raise UsageError(f"{name}, row {number}: the prompt is empty.")
        length = len(encode_prompts([prompt], tokenizer, args.template_arguments)[0])
        if length == 0:
            raise UsageError(f"{name}, row {number}: the tokenizer makes no token of the prompt {prompt!r}.")
        if args.max_prompt_length is not None and length > args.max_prompt_length:
            raise UsageError(
                f"{name}, row {number}: the prompt has {length} tokens, more than max_prompt_length="
                f"{args.max_prompt_length}. Leave the row out, or raise max_prompt_length."
            )
        if context is not None and length + args.max_completion_length > context:
            raise UsageError(
                f"{name}, row {number}: the prompt's {length} tokens and max_completion_length="
                f"{args.max_completion_length} exceed the model's context of {context}. Shorten the prompt, drop the "
                "row, or lower max_completion_length."
            )


def check_batch(dataset_size: int, per_device_batch: int, processes: int) -> None:
    """Check that the prompts fill at least one iteration.

    Raises:
        UsageError: they do not, and Trainer would end without a step.
    """
    if dataset_size < per_device_batch * processes:
        raise UsageError(
            f"The training set has {dataset_size} prompts, but one iteration takes {per_device_batch * processes} "
            f"(per_device_train_batch_size={per_device_batch} x {processes} processes). Lower the batch size or add "
            "prompts."
        )
