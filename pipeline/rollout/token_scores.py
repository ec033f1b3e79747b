"""Log-probabilities and values of sampled tokens, on sequences without left padding."""

import inspect

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from tieback.pipeline.trl_internals import selective_log_softmax_and_entropy
from tieback.reward_model.head import apply_head


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


def completion_logprobs(
    model: nn.Module, inputs: dict[str, Tensor], temperature: float, entropy_requires_grad: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability of each sampled token, and entropy of the distribution that it was drawn from.

    Sequences stand as prompt, completion, padding. With nothing to the left of the prompt, causal attention needs
    neither an attention mask nor position ids, so every architecture scores a padded row as it would the bare one.

    Args:
        model: causal language model.
        inputs: `input_ids` [b, L], `prompt_lengths` [b], `completion_ids` [b, T] (see `pack_sequences`).
        temperature: the logits are divided by it, as they were in sampling.
        entropy_requires_grad: whether gradients flow through the entropy.

    Returns:
        `logprobs` [b, T] and `entropy` [b, T] in nats, float32. Past a completion's end they mean nothing.
    """
    input_ids = inputs["input_ids"]
    first = int(inputs["prompt_lengths"].min()) - 1
    kept = input_ids.shape[1] - first
    arguments = inspect.signature(base_model(model).forward).parameters
    if "logits_to_keep" in arguments:
        logits = model(input_ids=input_ids, use_cache=False, logits_to_keep=kept).logits
    else:
        logits = model(input_ids=input_ids, use_cache=False).logits[:, first:]
    # The last position predicts nothing that was sampled.
    logprobs, entropy = selective_log_softmax_and_entropy(
        logits[:, :-1].float(), input_ids[:, first + 1 :], entropy_requires_grad, temperature
    )
    columns = _completion_columns(inputs, inputs["completion_ids"].shape[1]) - first
    columns = columns.clamp(max=logprobs.shape[1] - 1)
    return logprobs.gather(1, columns), entropy.gather(1, columns)


def completion_values(critic: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Value of the prompt, and of the prompt with each token of the completion after it.

    Args:
        critic: sequence-classification model with one label; its head is applied at every position.
        inputs: as for `completion_logprobs`.

    Returns:
        [b, T + 1] float32: column t is the value of the state in which token t is sampled, so that column 0
        stands at the prompt's last token; the last column is the state after the last token.
    """
    hidden = critic.base_model(input_ids=inputs["input_ids"], use_cache=False).last_hidden_state
    columns = _completion_columns(inputs, inputs["completion_ids"].shape[1] + 1).clamp(
        max=hidden.shape[1] - 1
    )
    chosen = hidden.gather(1, columns.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
    return apply_head(critic, chosen)


def _completion_columns(inputs: dict[str, Tensor], count: int) -> Tensor:
    offsets = torch.arange(count, device=inputs["input_ids"].device)
    return inputs["prompt_lengths"].unsqueeze(1) - 1 + offsets


def base_model(model: nn.Module) -> nn.Module:
    """Return the model itself, or the one that PEFT has wrapped."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
