"""Prompts to token ids, sampled ids to texts, and the rollout that holds both."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

from transformers import PreTrainedTokenizerBase

from tieback.data.conversations import TextOrMessages
from tieback.pipeline.rollout.sampler import Completion


@dataclass
class Rollout:
    """Prompts and what a policy answered, a list item for each of B rows.

    Args:
        prompts: as the dataset has them, plain or conversational.
        columns: the dataset's other columns, name to list [B], which reward functions receive.
        prompt_ids: token ids of the prompt as the policy saw it.
        completion_ids: sampled token ids, the one that ended the completion included; never empty.
        truncated: whether the completion was cut at the length limit, without an end of its own.
        completions: decoded text, or for a conversational prompt a list with one assistant message.
        logprobs: log-probability of each token by the sampler itself, where it tells them; anything where the policy did
            not write.
        env_mask: of each token of the completions, whether the policy wrote it; the others came from an environment (see
            `trainer.rollout_function`). None: it wrote all.
    """

    prompts: list[TextOrMessages]
    columns: dict[str, list[Any]]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    truncated: list[bool]
    completions: list[TextOrMessages]
    logprobs: list[list[float]] | None = None
    env_mask: list[list[bool]] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def written(self, row: int) -> Sequence[int]:
        """Places of the tokens in a completion that the policy wrote, in order; never none."""
        places = range(len(self.completion_ids[row]))
        return places if self.env_mask is None else list(compress(places, self.env_mask[row]))


def make_rollout(
    rows: Sequence[dict[str, Any]],
    prompt_ids: list[list[int]],
    completions: Sequence[Completion],
    tokenizer: PreTrainedTokenizerBase,
) -> Rollout:
    """Join B rows of a data set, which have a `prompt`, with the completions sampled for them."""
    prompts = [row["prompt"] for row in rows]
    completion_ids = [completion.ids for completion in completions]
    logprobs = [completion.logprobs for completion in completions if completion.logprobs is not None]
    return Rollout(
        prompts=prompts,
        columns={name: [row[name] for row in rows] for name in rows[0] if name != "prompt"},
        prompt_ids=prompt_ids,
        completion_ids=completion_ids,
        truncated=[completion.truncated for completion in completions],
        completions=decode_completions(prompts, prompt_ids, completion_ids, tokenizer),
        logprobs=logprobs or None,
    )


def encode_prompts(
    prompts: Sequence[TextOrMessages],
    tokenizer: PreTrainedTokenizerBase,
    template_arguments: dict[str, Any],
) -> list[list[int]]:
    """Token ids of each prompt; conversations go through the chat template with the generation prompt added.

    Args:
        prompts: plain or conversational.
        tokenizer: the policy's.
        template_arguments: `RolloutSettings.template_arguments`, which no stage may leave out.
    """
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
                **template_arguments,
            )["input_ids"]
            encoded.append(list(ids))
    return encoded


def decode_completions(
    prompts: Sequence[TextOrMessages],
    prompt_ids: Sequence[list[int]],
    completion_ids: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
) -> list[TextOrMessages]:
    """Text of each completion without special tokens, in the shape that TRL hands to reward functions.

    A completion of plain text goes on where its prompt stops, so the two are decoded together and the prompt's text is
    cut off: the decoder of a SentencePiece tokenizer drops the space before the first token that it is given. A
    message of the assistant's begins a text of its own, before which that space does not belong.
    """

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    decoded: list[TextOrMessages] = []
    for prompt, before, sampled in zip(prompts, prompt_ids, completion_ids, strict=True):
        if isinstance(prompt, list):
            decoded.append([{"role": "assistant", "content": text(sampled)}])
            continue
        # The prompt as it was read, not as it was written: a normaliser may have changed it. Where the completion
        # changes how the prompt's own tokens read (bytes that join into one character), it is read alone.
        read, whole = text(before), text(before + sampled)
        decoded.append(whole.removeprefix(read) if whole.startswith(read) else text(sampled))
    return decoded
