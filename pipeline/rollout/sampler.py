"""Samplers: token ids of prompts in, completions out. Another engine is one more class here, and a case in `make_sampler`.

A token's probability is softmax(logits / temperature) and nothing else, which is what scoring computes; PPO's first
iteration compares the two.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from tieback.cli.errors import UsageError
from tieback.pipeline.rollout.generation import generate_completions
from tieback.pipeline.rollout.settings import RolloutSettings


@dataclass(frozen=True)
class Completion:
    """What was sampled for one prompt.

    Args:
        ids: token ids, the one that ended the completion included; never empty.
        truncated: whether it was cut at the length limit, without an end of its own.
        logprobs: log-probability of each token in the distribution that it was drawn from, in nats, where asked for.
    """

    ids: list[int]
    truncated: bool
    logprobs: list[float] | None = None


class Sampler(Protocol):
    """What ppo, collect and evaluate ask of an engine."""

    end_ids: list[int]

    def sync(self, model: nn.Module) -> None:
        """Take over the weights of `model`, which has a `generate`; called before each rollout."""

    def sample(
        self,
        prompt_ids: list[list[int]],
        seed: int | None = None,
        with_logprobs: bool = False,
        max_length: int | None = None,
    ) -> list[Completion]:
        """Sample one completion for each prompt, in the order given.

        Args:
            prompt_ids: token ids of B prompts.
            seed: of these samples; None goes on with the random numbers of the process.
            with_logprobs: fill in `Completion.logprobs`; the logits of all tokens are held meanwhile.
            max_length: most tokens in a completion, where fewer than in a rollout.
        """

    def unlike_scoring(self) -> list[str]:
        """Name the settings that change what is sampled and that scoring does not know of, for messages."""


def make_sampler(
    settings: RolloutSettings,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig | None,
    device: torch.device,
    batch_size: int | None = None,
    generation_arguments: dict[str, Any] | None = None,
) -> Sampler:
    """Make the sampler of a policy.

    Args:
        settings: of the rollout.
        tokenizer: the policy's; it has a pad token.
        generation_config: the policy's own, of which the EOS ids count and nothing else.
        device: of the policy.
        batch_size: prompts that `generate` samples for at a time; all that are given where None.
        generation_arguments: further arguments of `generate` that change speed and memory alone.

    Raises:
        UsageError: see `end_token_ids`; or vLLM is asked for and cannot be had.
    """
    end_ids = end_token_ids(tokenizer, generation_config, settings.stop_tokens)
    if settings.sampler == "vllm":
        if generation_arguments:
            raise UsageError(
                "generation_kwargs are arguments of Transformers' generate, not of sampler: vllm."
            )
        from tieback.pipeline.rollout.vllm_sampler import VLLMSampler  # which imports from here

        return VLLMSampler(settings, end_ids, device)
    return TransformersSampler(
        settings, end_ids, tokenizer.pad_token_id, device, batch_size, generation_arguments
    )


class TransformersSampler:
    """Samples with the policy's own `generate`, prompts padded on the left.

    Args:
        settings: temperature and length.
        end_ids: ids that end a completion (see `end_token_ids`).
        pad_id: any id; masks come from lengths.
        device: of the policy.
        batch_size: prompts generated for at a time; all that are given where None.
        generation_arguments: further fields of the `GenerationConfig`.
    """

    def __init__(
        self,
        settings: RolloutSettings,
        end_ids: list[int],
        pad_id: int,
        device: torch.device,
        batch_size: int | None = None,
        generation_arguments: dict[str, Any] | None = None,
    ) -> None:
        self.end_ids = end_ids
        self.device = device
        self.batch_size = batch_size
        # Built anew rather than from the model's own config, whose top-p, repetition penalty and the like scoring
        # would not know of.
        self.config = GenerationConfig(
            do_sample=True,
            temperature=settings.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=settings.max_completion_length,
            eos_token_id=end_ids,
            pad_token_id=pad_id,
            **(generation_arguments or {}),
        )
        self._model: Any = None

    def sync(self, model: nn.Module) -> None:
        """Sample from this very model from now on."""
        self._model = model

    def sample(
        self,
        prompt_ids: list[list[int]],
        seed: int | None = None,
        with_logprobs: bool = False,
        max_length: int | None = None,
    ) -> list[Completion]:
        """Sample one completion for each prompt (see `Sampler.sample`)."""
        if seed is not None:
            torch.manual_seed(seed)
        longest = self.config.max_new_tokens
        length = longest if max_length is None else min(longest, max_length)
        size = self.batch_size or len(prompt_ids)
        # Prompts of like lengths together, for little padding.
        order = sorted(range(len(prompt_ids)), key=lambda row: len(prompt_ids[row]))
        order = order if size < len(prompt_ids) else list(range(len(prompt_ids)))
        completions: dict[int, Completion] = {}
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            ids, mask = left_pad([prompt_ids[row] for row in rows], self.config.pad_token_id, self.device)
            sampled, logprobs = generate_completions(
                self._model, ids, mask, self.config, length, self.end_ids, with_logprobs
            )
            for row, tokens, of_tokens in zip(rows, sampled, logprobs, strict=True):
                kept, truncated = cut_at_end(tokens, self.end_ids)
                completions[row] = Completion(
                    kept, truncated, of_tokens[: len(kept)] if with_logprobs else None
                )
        return [completions[row] for row in range(len(prompt_ids))]

    def unlike_scoring(self) -> list[str]:
        """Name the fields of the generation config that are not those of plain sampling."""
        neutral = GenerationConfig(do_sample=True, top_k=0, top_p=1.0).to_dict()
        own = {"temperature", "max_new_tokens", "eos_token_id", "pad_token_id", "transformers_version"}
        return [
            f"generation_kwargs sets {name}={value!r}"
            for name, value in self.config.to_dict().items()
            if name not in own and value != neutral.get(name)
        ]


def end_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig | None,
    stop_tokens: list[str] | None,
) -> list[int]:
    """Ids that end a completion: those of `own_end_ids`, and `stop_tokens`.

    Raises:
        UsageError: a stop token is not one token of the vocabulary, or nothing at all ends a completion.
    """
    ids = own_end_ids(tokenizer, generation_config)
    for token in stop_tokens or []:
        encoded = tokenizer.encode(token, add_special_tokens=False)
        if len(encoded) != 1:
            raise UsageError(
                f"stop_tokens: {token!r} is {len(encoded)} tokens of this tokenizer; name a single one."
            )
        ids.append(encoded[0])
    if not ids:
        raise UsageError("The tokenizer has no EOS token: name what ends a completion in stop_tokens.")
    return list(dict.fromkeys(ids))


def own_end_ids(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None) -> list[int]:
    """Ids that end a completion of a model by itself, each once: EOS of tokenizer and model, and the end of a turn."""
    declared = generation_config.eos_token_id if generation_config is not None else None
    ids = [
        tokenizer.eos_token_id,
        *(declared if isinstance(declared, list) else [declared]),
        end_of_turn_id(tokenizer),
    ]
    return list(dict.fromkeys(token_id for token_id in ids if token_id is not None))


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """First special token that the chat template writes after an assistant's message, if any."""
    if tokenizer.chat_template is None:
        return None
    content = "ok"
    turn = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    text = tokenizer.apply_chat_template(turn, tokenize=False)
    ending = tokenizer(text.rpartition(content)[2], add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((token_id for token_id in ending if token_id in special), None)


def left_pad(rows: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids as `input_ids` and `attention_mask`, both [b, longest], padded on the left for `generate`."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def cut_at_end(generated: list[int], end_ids: list[int]) -> tuple[list[int], bool]:
    """The generated ids up to and with the first end token, and whether there was none.

    Only generated ids are looked at, so an EOS inside the prompt ends nothing; and as `generate` stops a row at its
    first end token, what follows is padding even where the pad token is an end token too.
    """
    ends = set(end_ids)
    for position, token in enumerate(generated):
        if token in ends:
            return generated[: position + 1], False
    return generated, True
