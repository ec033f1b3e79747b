"""Rollouts: prompts to token ids, sampled completions, and the packed tensors that scoring reads."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from tieback.cli.errors import UsageError

Prompt = str | list[dict[str, str]]


@dataclass
class Rollout:
    """One iteration's prompts and what the policy answered, a list item for each of B rows.

    Args:
        prompts: as the dataset has them, plain or conversational.
        columns: the dataset's other columns, name to list [B], which reward functions receive.
        prompt_ids: token ids of the prompt as the policy saw it.
        completion_ids: sampled token ids, the one that ended the completion included; never empty.
        truncated: whether the completion was cut at the length limit, without an end of its own.
        completions: decoded text, or for a conversational prompt a list with one assistant message.
    """

    prompts: list[Prompt]
    columns: dict[str, list[Any]]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    truncated: list[bool]
    completions: list[Any]

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass
class ScoredRollout:
    """A rollout with its scores.

    Args:
        rollout: B completions.
        rewards: [B, F], what each reward function returned; NaN where it does not judge the row.
        raw_scores: [B], the weighted sum of the rewards.
        scores: [B], what PPO maximises at the last token: the raw score, normalised and clipped where that is set, less
            the missing-EOS penalty.
    """

    rollout: Rollout
    rewards: Tensor
    raw_scores: Tensor
    scores: Tensor


def end_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig | None,
    stop_tokens: list[str] | None,
) -> list[int]:
    """Ids that end a completion: the tokenizer's EOS, all of the generation config's, and `stop_tokens`.

    Raises:
        UsageError: a stop token is not one token of the vocabulary, or nothing at all ends a completion.
    """
    declared = generation_config.eos_token_id if generation_config is not None else None
    ids = [tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])]
    for token in stop_tokens or []:
        encoded = tokenizer.encode(token, add_special_tokens=False)
        if len(encoded) != 1:
            raise UsageError(
                f"stop_tokens: {token!r} is {len(encoded)} tokens of this tokenizer; name a single one."
            )
        ids.append(encoded[0])
    unique = list(dict.fromkeys(i for i in ids if i is not None))
    if not unique:
        raise UsageError("The tokenizer has no EOS token: name what ends a completion in stop_tokens.")
    return unique


def encode_prompts(
    prompts: list[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[list[int]]:
    """Token ids of each prompt; conversations go through the chat template with the generation prompt added."""
    encoded = []
    for prompt in prompts:
        if isinstance(prompt, str):
            encoded.append(list(tokenizer(prompt)["input_ids"]))
        else:
            ids = tokenizer.apply_chat_template(
                prompt,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                **(chat_template_kwargs or {}),
            )["input_ids"]
            encoded.append(list(ids))
    return encoded


def decode_completions(
    prompts: list[Prompt], completion_ids: list[list[int]], tokenizer: PreTrainedTokenizerBase
) -> list[Any]:
    """Text of each completion without special tokens, in the shape that TRL hands to reward functions."""
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    return [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]


def sampling_config(
    temperature: float,
    max_new_tokens: int,
    eos_ids: list[int],
    pad_id: int,
    extra: dict[str, Any] | None = None,
) -> GenerationConfig:
    """Generation settings under which a token's probability is softmax(logits / temperature), and nothing else.

    Built anew rather than from the model's own config, whose top-p, repetition penalty and the like scoring would
    not know of.
    """
    return GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_ids,
        pad_token_id=pad_id,
        **(extra or {}),
    )


def left_pad(rows: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids as `input_ids` and `attention_mask`, both [b, longest], padded on the left for `generate`."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def sample(
    model: Any, prompt_ids: list[list[int]], config: GenerationConfig, batch_size: int, device: torch.device
) -> tuple[list[list[int]], list[bool]]:
    """Sample one completion for each prompt.

    Args:
        model: what has a `generate`.
        prompt_ids: token ids of B prompts.
        config: see `sampling_config`.
        batch_size: prompts generated for at a time.
        device: of the model.

    Returns:
        Token ids of each completion, its end token included, and whether it was cut at the limit.
    """
    completions: list[list[int]] = []
    truncated: list[bool] = []
    for start in range(0, len(prompt_ids), batch_size):
        ids, mask = left_pad(prompt_ids[start : start + batch_size], config.pad_token_id, device)
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        for row in output[:, ids.shape[1] :].tolist():
            completion, was_cut = cut_at_end(row, config.eos_token_id)
            completions.append(completion)
            truncated.append(was_cut)
    return completions, truncated


def cut_at_end(generated: list[int], eos_ids: list[int]) -> tuple[list[int], bool]:
    """The generated ids up to and with the first end token, and whether there was none.

    Only generated ids are looked at, so an EOS inside the prompt is none of its business; and as `generate` stops a
    row at its first end token, what follows is padding even where the pad token is an end token too.
    """
    ends = set(eos_ids)
    for position, token in enumerate(generated):
        if token in ends:
            return generated[: position + 1], False
    return generated, True


def own_rows(count: int, rank: int, processes: int) -> list[int]:
    """Rows of a data set that one process evaluates: as many on each, as some backends compute in step.

    The processes' rows one after the other are the data set in its order, and then some of its first rows again.
    """
    share = math.ceil(count / processes)
    return [row % count for row in range(rank * share, (rank + 1) * share)]


def pack_sequences(
    prompt_ids: list[list[int]], completion_ids: list[list[int]], pad_id: int, device: torch.device
) -> dict[str, Tensor]:
    """Tensors for scoring: every row is prompt, completion, padding, with no padding between or before.

    Returns:
        `input_ids` [B, L], `prompt_lengths` [B], `completion_ids` [B, T] and `mask` [B, T] (bool, True on sampled
        tokens; made from the lengths, never by comparing ids).
    """
    rows = [prompt + completion for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
    width = max(len(row) for row in rows)
    longest = max(len(completion) for completion in completion_ids)
    lengths = torch.tensor([len(completion) for completion in completion_ids], device=device)
    return {
        "input_ids": torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], device=device),
        "prompt_lengths": torch.tensor([len(prompt) for prompt in prompt_ids], device=device),
        "completion_ids": torch.tensor(
            [completion + [pad_id] * (longest - len(completion)) for completion in completion_ids],
            device=device,
        ),
        "mask": torch.arange(longest, device=device) < lengths.unsqueeze(1),
    }
