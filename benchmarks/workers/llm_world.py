"""What both trainers are given: models of random weights, prompts, and lengths. It imports nothing of either."""

import json
import math
import random
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

PAD, EOS = 0, 1
FIRST_WORD = 2
PPO_EPOCHS = 4
MICRO_BATCH_SIZE = 16


@dataclass(frozen=True)
class World:
    """A case of the benchmark.

    Args:
        vocab_size: tokens in the vocabulary.
        rows: prompts in an iteration.
        prompt_lengths: least and greatest number of tokens in a prompt.
        max_completion_length: most tokens in a completion.
        mean_length: mean of the geometric distribution that lengths of completions come from; None where every
            completion is of the greatest length.
        hidden_size: of each model; its heads have 32 channels.
        num_layers: of each model.
    """

    vocab_size: int = 2048
    rows: int = 64
    prompt_lengths: tuple[int, int] = (32, 32)
    max_completion_length: int = 48
    mean_length: int | None = None
    hidden_size: int = 256
    num_layers: int = 6


WORLDS = {
    "equal": World(),
    "varied": World(prompt_lengths=(8, 64), max_completion_length=64, mean_length=16),
    "vocab50k": World(vocab_size=50_000),
    # Its completions are given (see skewed_tokens.py).
    "skewed": World(prompt_lengths=(10, 60), max_completion_length=512),
}


def make_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """A tokenizer in which each word is a token, so that decoding and encoding again change no length."""
    words = {"<pad>": PAD, "<eos>": EOS} | {
        f"w{number}": number for number in range(FIRST_WORD, world.vocab_size)
    }
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def prompts(world: World) -> list[str]:
    """One text for each row, of words at random."""
    dice = random.Random(0)
    return [
        " ".join(
            f"w{dice.randrange(FIRST_WORD, world.vocab_size)}"
            for _ in range(dice.randint(*world.prompt_lengths))
        )
        for _ in range(world.rows)
    ]


def world_named(name: str) -> World:
    """The case of that name, or one that is written out as JSON."""
    return World(**json.loads(name)) if name.startswith("{") else WORLDS[name]


def make_config(world: World) -> LlamaConfig:
    """A small Llama."""
    return LlamaConfig(
        vocab_size=world.vocab_size,
        hidden_size=world.hidden_size,
        intermediate_size=world.hidden_size * 11 // 4,
        num_hidden_layers=world.num_layers,
        num_attention_heads=world.hidden_size // 32,
        max_position_embeddings=2048,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )


def make_policy(world: World) -> PreTrainedModel:
    """A policy of random weights whose EOS token has the same chance whatever came before, which sets the lengths.

    A channel of its states is a constant: embeddings have it and no layer adds to it. The head's row of EOS reads that
    channel alone. (A bias would do as well, but engines have no Llama with one.)
    """
    torch.manual_seed(0)
    model = LlamaForCausalLM(make_config(world))
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 3.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        model.lm_head.weight[EOS] = 0.0
        states = model.model(torch.randint(FIRST_WORD, world.vocab_size, (8, 32))).last_hidden_state
        logit = -30.0
        if world.mean_length is not None:
            logit = float(model.lm_head(states).logsumexp(-1).mean()) - math.log(world.mean_length - 1)
        model.lm_head.weight[EOS, 0] = logit / states[..., 0].mean()
    return model


def make_classifier(world: World, seed: int) -> PreTrainedModel:
    """A critic or a reward model of the same shape."""
    torch.manual_seed(seed)
    config = make_config(world)
    config.num_labels = 1
    return LlamaForSequenceClassification(config)
