"""The head of a language model: its log-probabilities are those of whole logits, which are never held."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import COMPLETIONS, CPU, END, PAD, PROMPTS
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GPTJConfig,
    GraniteConfig,
    LlamaConfig,
    PreTrainedModel,
)

from tieback.pipeline.rollout import language_head
from tieback.pipeline.rollout.token_scores import completion_logprobs, pack_sequences

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "eos_token_id": END,
    "pad_token_id": PAD,
    "bos_token_id": END,
}
GPT_J = {
    "n_embd" if name == "hidden_size" else name: value
    for name, value in SIZES.items()
    if name not in ("intermediate_size", "num_key_value_heads", "head_dim", "num_attention_heads")
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "a factor": lambda: CohereConfig(**SIZES, logit_scale=0.3),
    "a divisor": lambda: GraniteConfig(**SIZES, logits_scaling=3.0),
    "a multiplier of the head": lambda: FalconH1Config(**SIZES, lm_head_multiplier=0.4, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8),
    "a cap": lambda: Gemma2Config(**SIZES, final_logit_softcapping=1.5),
    "a bias": lambda: GPTJConfig(**GPT_J, n_head=4, n_layer=1, rotary_dim=8),
    "nothing": lambda: LlamaConfig(**SIZES),
}  # fmt: skip


def make(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    bias = model.get_output_embeddings().bias
    if bias is not None:
        torch.nn.init.normal_(bias)
    return model


def by_whole_logits(model: Any, packed: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's own logits, put through log_softmax."""
    logprobs, entropies = [], []
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        log_softmax = (
            model(packed["input_ids"][row : row + 1], use_cache=False).logits[0].float() / 0.7
        ).log_softmax(-1)
        own = log_softmax[len(prompt) - 1 :][: len(completion)]
        logprobs.append(own[range(len(completion)), completion])
        entropies.append(-(own.exp() * own).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


@pytest.mark.parametrize("chunk", [7, 2**24])
@pytest.mark.parametrize("name", CONFIGS)
def test_log_probabilities_entropies_and_gradients_are_those_of_whole_logits(
    name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_head, "CHUNK_ON_CPU", chunk * 20)
    compare(make(name))


@pytest.mark.parametrize("target_modules", [["lm_head"], "all-linear"])
def test_an_adapter_in_the_head_is_not_forgotten(
    target_modules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_head, "CHUNK_ON_CPU", 60 * 3)  # three tokens at a time
    config = LoraConfig(
        r=4, target_modules=target_modules, task_type="CAUSAL_LM", init_lora_weights=False,
        exclude_modules=None if "lm_head" in target_modules else ["lm_head"],
    )  # fmt: skip
    compare(get_peft_model(make("nothing"), config))


def compare(model: Any) -> None:
    packed = pack_sequences(PROMPTS, COMPLETIONS, PAD, CPU)
    mask = packed["mask"]
    found = []
    for scores in (
        lambda: tuple(x[mask] for x in completion_logprobs(model, packed, 0.7, entropy_requires_grad=True)),
        lambda: by_whole_logits(model, packed),
    ):
        logprobs, entropies = scores()
        weights = torch.linspace(-1, 1, len(logprobs))
        model.zero_grad()
        (weights * logprobs + weights.flip(0) * entropies).sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((logprobs.detach(), entropies.detach(), gradients))
    (logprobs, entropies, gradients), expected = found
    torch.testing.assert_close(logprobs, expected[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(entropies, expected[1], rtol=0, atol=2e-5)
    torch.testing.assert_close(gradients, expected[2], rtol=1e-4, atol=2e-5)
    assert gradients


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("adapter", [False, True])
def test_no_more_logits_than_a_chunk_are_held(adapter: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = 20_000
    chunk = 3 * vocabulary
    monkeypatch.setattr(language_head, "CHUNK_ON_CPU", chunk)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES | {"vocab_size": vocabulary, "hidden_size": 2, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2}))  # fmt: skip
    if adapter:
        model = get_peft_model(model, LoraConfig(r=1, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    packed = pack_sequences(PROMPTS, COMPLETIONS, PAD, CPU)
    with Largest() as largest:
        logprobs, entropies = completion_logprobs(model, packed, 1.0, entropy_requires_grad=True)
        (logprobs.sum() + entropies.sum()).backward()
    assert vocabulary * 2 <= largest.elements <= chunk
