"""Checks that end a run before compute is spent: data that cannot be used, and a ratio that would not begin at 1."""

import copy
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from tieback.cli.errors import UsageError
from tieback.pipeline.trainer.actor_critic import ActorCritic, completion_logprobs
from tieback.pipeline.trainer.config import PPOConfig
from tieback.pipeline.trainer.models import active_dropouts
from tieback.pipeline.trainer.rollout import cut_at_end, encode_prompts, left_pad, pack_sequences

# Largest |log ratio| that rounding explains, in fp32 and in bf16.
FP32_TOLERANCE, BF16_TOLERANCE = 1e-3, 0.5


class SelfCheckError(UsageError):
    """Sampling and scoring disagree, so that PPO's ratio would be wrong."""


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
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    for number, prompt in enumerate(dataset["prompt"], start=1):
        text = prompt if isinstance(prompt, str) else prompt[-1].get("content") if prompt else ""
        if not isinstance(text, str) or not text.strip():
            raise UsageError(f"{name}, row {number}: the prompt is empty.")
        length = len(encode_prompts([prompt], tokenizer, args.template_arguments)[0])
        if length == 0:
            raise UsageError(f"{name}, row {number}: the tokenizer makes no token of the prompt {prompt!r}.")
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


@torch.no_grad()
def check_sampling(
    model: ActorCritic, prompt_ids: list[list[int]], config: GenerationConfig, accelerator: Accelerator
) -> None:
    """Sample for a few prompts, and compare the probabilities that `generate` drew from with those of scoring.

    Old log-probabilities come from scoring, so the ratio is 1 at first even where sampling differs; only this
    comparison shows left padding, a temperature or a logits processor that scoring does not know of.

    Raises:
        SelfCheckError: they differ by more than rounding.
    """
    device = accelerator.device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        ids, mask = left_pad(prompt_ids, config.pad_token_id, device)
        verbose = copy.deepcopy(config)
        verbose.return_dict_in_generate = verbose.output_scores = True
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=verbose)
    completion_ids = [
        cut_at_end(row, config.eos_token_id)[0] for row in output.sequences[:, ids.shape[1] :].tolist()
    ]
    inputs = pack_sequences(prompt_ids, completion_ids, config.pad_token_id, device)
    scored, _ = completion_logprobs(model.policy, inputs, model.temperature)
    # Scores are the logits after temperature and every processor: what was sampled from.
    distributions = torch.stack(output.scores, dim=1)[:, : scored.shape[1]].float().log_softmax(-1)
    sampled = distributions.gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1)
    difference = float((sampled - scored)[inputs["mask"]].abs().max())
    if not difference <= _tolerance(model, accelerator.mixed_precision):
        raise SelfCheckError(
            f"generate() and scoring disagree by {difference:.3g} nats about the probability of a sampled token. "
            f"{_suspects(model, config)}"
        )


def check_ratio(max_abs_log_ratio: float, model: nn.Module, mixed_precision: str) -> None:
    """Check that the first minibatch, before any step, gave back the rollout's log-probabilities.

    Raises:
        SelfCheckError: its ratio is not 1.
    """
    if not max_abs_log_ratio <= _tolerance(model, mixed_precision):
        raise SelfCheckError(
            f"Before the first step the probability ratio must be 1, but the largest |log ratio| is "
            f"{max_abs_log_ratio:.3g}. {_suspects(model)}"
        )


def _tolerance(model: nn.Module, mixed_precision: str) -> float:
    """That of bf16 under autocast, and where weights themselves are kept in less than fp32 (a quantised base, say)."""
    exact = all(parameter.dtype == torch.float32 for parameter in model.parameters())
    return FP32_TOLERANCE if exact and mixed_precision == "no" else BF16_TOLERANCE


def _suspects(model: nn.Module, config: GenerationConfig | None = None) -> str:
    found: list[Any] = [
        f"{'dropout' if attribute == 'p' else attribute} {getattr(module, attribute)} is active in {name} "
        "(set disable_dropout=True)"
        for name, module, attribute in active_dropouts(model)
        if module.training
    ]
    if config is not None:
        neutral = GenerationConfig(do_sample=True, top_k=0, top_p=1.0).to_dict()
        own = {"temperature", "max_new_tokens", "eos_token_id", "pad_token_id", "transformers_version"}
        found += [
            f"generation_kwargs sets {name}={value!r}"
            for name, value in config.to_dict().items()
            if name not in own and value != neutral.get(name)
        ]
    if found:
        return "Likely cause: " + "; ".join(found[:3]) + "."
    return (
        "No dropout and no sampling setting explains it: the model itself computes differently in the two passes "
        "(a state that training mode changes, padding that it attends to, or an attention kernel that is not exact)."
    )
