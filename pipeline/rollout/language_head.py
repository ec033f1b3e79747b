"""The head of a language model, from hidden states to log-probabilities, without the logits of the whole vocabulary."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel

from tieback.pipeline.trl_internals import ChunkedLogProbFunction, selective_log_softmax_and_entropy
from tieback.ppo_core.calling import call_as

# Most logits that are held at a time: 64 MiB in fp32; on a CPU 2 MiB, which stay in its cache.
CHUNK, CHUNK_ON_CPU = 2**24, 2**19
# Tokens that TRL's function takes at a time.
_TOKENS = 4096


def token_logprobs(
    model: PreTrainedModel, hidden: Tensor, ids: Tensor, temperature: float, entropy_requires_grad: bool
) -> tuple[Tensor, Tensor]:
    """Log-probability of tokens, and entropy of the distributions that they were drawn from.

    Forward and backward pass hold at most `CHUNK` logits each time (on a CPU `CHUNK_ON_CPU`), whatever the vocabulary and the
    number of tokens.

    Args:
        model: causal language model.
        hidden: [..., d], last hidden states of its backbone.
        ids: [...], the tokens.
        temperature: the logits are divided by it.
        entropy_requires_grad: whether gradients flow through the entropy.

    Returns:
        `logprobs` and `entropy`, both [...] float32.
    """
    head = model.get_output_embeddings()
    scale, softcap = logit_transform(model.config)
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), ids.reshape(-1)
    chunk = CHUNK_ON_CPU if hidden.device.type == "cpu" else CHUNK

    def fused(states: Tensor) -> tuple[Tensor, Tensor]:
        width = min(max(chunk // min(len(states), _TOKENS), 1), len(head.weight))
        logprobs, entropy, *_ = ChunkedLogProbFunction.apply(
            states, head.weight, head.bias, targets, temperature, width, softcap, scale, ("entropy",)
        )
        return logprobs, entropy

    def by_head(states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(states).float() * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return selective_log_softmax_and_entropy(logits, tokens, entropy_requires_grad, temperature)

    if type(head) is nn.Linear:
        # Inside a call of the head, for whose weights ZeRO-3 waits.
        logprobs, entropy = call_as(head, fused, flat)
    else:  # an adapter is in it, or it is quantised
        size = max(chunk // model.config.get_text_config().vocab_size, 1)
        parts = [
            checkpoint(by_head, *part, use_reentrant=False)
            for part in zip(flat.split(size), targets.split(size), strict=True)
        ]
        logprobs, entropy = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    if not entropy_requires_grad:
        entropy = entropy.detach()
    return logprobs.view(ids.shape), entropy.view(ids.shape)


def logit_transform(config: PreTrainedConfig) -> tuple[float, float | None]:
    """What a family does to its logits: the factor that it multiplies them by, and the cap of a tanh (None: no cap)."""
    text = config.get_text_config()
    scale = next(
        (
            value
            for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")
            if (value := getattr(text, name, None)) is not None
        ),
        None,
    )
    divisor = getattr(text, "logits_scaling", None)
    if scale is None and divisor is not None:
        scale = divisor if text.model_type == "hyperclovax" else 1 / divisor
    return 1.0 if scale is None else scale, getattr(text, "final_logit_softcapping", None)
