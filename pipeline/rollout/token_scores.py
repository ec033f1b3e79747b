"""Log-probabilities and values of sampled tokens, on sequences without left padding."""

from typing import cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from tieback.pipeline.rollout.language_head import token_logprobs
from tieback.ppo_core.calling import call_as
from tieback.reward_model.head import apply_head, last_position


def pack_sequences(
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    pad_id: int,
    device: torch.device,
    env_mask: list[list[bool]] | None = None,
) -> dict[str, Tensor]:
    """Tensors for scoring: every row is prompt, completion, padding, with no padding between or before.

    Args:
        prompt_ids: of B prompts.
        completion_ids: of their completions.
        pad_id: any id.
        device: of the tensors.
        env_mask: which tokens of the completions the policy wrote; all where None.

    Returns:
        `input_ids` [B, L], `prompt_lengths` [B], `completion_ids` [B, T], `completion_lengths` [B] and `mask` [B, T]
        (bool, True on the policy's tokens; made from the lengths, never by comparing ids).
    """
    rows = [prompt + completion for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
    width = max(len(row) for row in rows)
    longest = max(len(completion) for completion in completion_ids)
    lengths = torch.tensor([len(completion) for completion in completion_ids], device=device)
    mask = torch.arange(longest, device=device) < lengths.unsqueeze(1)
    if env_mask is not None:
        written = [row + [False] * (longest - len(row)) for row in env_mask]
        mask &= torch.tensor(written, device=device)
    return {
        "input_ids": torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], device=device),
        "prompt_lengths": torch.tensor([len(prompt) for prompt in prompt_ids], device=device),
        "completion_ids": torch.tensor(
            [completion + [pad_id] * (longest - len(completion)) for completion in completion_ids],
            device=device,
        ),
        "completion_lengths": lengths,
        "mask": mask,
    }


def trim(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Some rows of what `pack_sequences` made, without the columns that are padding in all of them.

    Where completions of unlike lengths are left, `token_index` [b, K] says at which of the b · T places of `completion_ids`
    their tokens are, in any rows; b · T where there are no more. It is made here, on the CPU: a GPU would have to be
    waited for.
    """
    lengths = inputs["completion_lengths"]
    completion = int(lengths.max())
    width = int((inputs["prompt_lengths"] + lengths).max())
    trimmed = inputs | {
        "input_ids": inputs["input_ids"][:, :width],
        "completion_ids": inputs["completion_ids"][:, :completion],
    }
    is_token = torch.arange(completion, device=lengths.device) < lengths.unsqueeze(1)
    if not is_token.all():
        index = is_token.flatten().nonzero().squeeze(1)
        missing = -len(index) % len(lengths)
        trimmed["token_index"] = nn.functional.pad(index, (0, missing), value=is_token.numel()).view(
            len(lengths), -1
        )
    return trimmed


def completion_logprobs(
    model: nn.Module, inputs: dict[str, Tensor], temperature: float, entropy_requires_grad: bool = False
) -> tuple[Tensor, Tensor]:
    """`logprobs` and `entropy` of `completion_scores`."""
    logprobs, entropy, _ = completion_scores(model, inputs, temperature, entropy_requires_grad)
    return logprobs, entropy


def completion_scores(
    model: nn.Module, inputs: dict[str, Tensor], temperature: float, entropy_requires_grad: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each sampled token, and entropy of the distribution that it was drawn from.

    Sequences stand as prompt, completion, padding. With nothing to the left of the prompt, causal attention needs
    neither an attention mask nor position ids, so every architecture scores a padded row as it would the bare one.

    Args:
        model: causal language model, or one wrapped by PEFT.
        inputs: `input_ids` [b, L], `prompt_lengths` [b], `completion_ids` [b, T] (see `pack_sequences`), and
            what `trim` adds: with `token_index` the head computes the tokens alone.
        temperature: the logits are divided by it, as they were in sampling.
        entropy_requires_grad: whether gradients flow through the entropy.

    Returns:
        `logprobs` [b, T] and `entropy` [b, T] in nats, float32; and the backbone's last hidden states [b, T + 1, d] at
        the states of the completions (see `completion_hidden`). Past a completion's end they mean nothing;
        with `token_index` the first two are 0 there.
    """

    def scores() -> tuple[Tensor, Tensor, Tensor]:
        hidden = _hidden(backbone(model), inputs)
        states, ids, index = hidden[:, :-1], inputs["completion_ids"], inputs.get("token_index")
        if index is None:
            return *token_logprobs(base_model(model), states, ids, temperature, entropy_requires_grad), hidden
        index, size = index.flatten(), ids.numel()
        places = index.clamp(max=size - 1)
        states, tokens = states.flatten(0, 1)[places], ids.flatten()[places]
        found = token_logprobs(base_model(model), states, tokens, temperature, entropy_requires_grad)
        nothing = hidden.new_zeros(size + 1, dtype=torch.float32)
        logprobs, entropy = (nothing.index_put((index,), x)[:size].view(ids.shape) for x in found)
        return logprobs, entropy, hidden

    return call_as(model, scores)


def completion_hidden(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The backbone's last hidden states [b, T + 1, d] at the states of the completions.

    Column t is the state in which token t is sampled, so that column 0 stands at the prompt's last token; the last
    column is the state after the last token.

    Args:
        model: causal language model, or one wrapped by PEFT; its head is not used.
        inputs: as for `completion_scores`.
    """
    return call_as(model, lambda: _hidden(backbone(model), inputs))


def completion_values(critic: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Value of the prompt, and of the prompt with each token of the completion after it.

    Args:
        critic: sequence-classification model with one label; its head is applied at every position.
        inputs: as for `completion_scores`.

    Returns:
        [b, T + 1] float32, at the states of `completion_hidden`.
    """
    return apply_head(critic, _hidden(critic.base_model, inputs))


def last_hidden(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The backbone's hidden states [b, d] at the last position of the mask.

    Args:
        model: causal language model, or one wrapped by PEFT; its head is not used.
        inputs: `input_ids` and `attention_mask`, both [b, L], padded on the right.
    """
    hidden = call_as(model, lambda: backbone(model)(**inputs, use_cache=False).last_hidden_state)
    rows = torch.arange(len(hidden), device=hidden.device)
    return hidden[rows, last_position(inputs["attention_mask"])]


def _hidden(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    hidden = model(input_ids=inputs["input_ids"], use_cache=False).last_hidden_state
    offsets = torch.arange(inputs["completion_ids"].shape[1] + 1, device=hidden.device)
    columns = inputs["prompt_lengths"].unsqueeze(1) - 1 + offsets
    columns = columns.clamp(max=hidden.shape[1] - 1)  # of padding
    return hidden.gather(1, columns.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def base_model(model: nn.Module) -> PreTrainedModel:
    """Return the model itself, or the one that PEFT has wrapped."""
    return model.get_base_model() if isinstance(model, PeftModel) else cast(PreTrainedModel, model)


def backbone(model: nn.Module) -> nn.Module:
    """Return what is below the head of a language model, plain or wrapped by PEFT."""
    return cast(nn.Module, base_model(model).base_model)
