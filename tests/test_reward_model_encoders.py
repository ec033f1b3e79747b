"""Encoders as reward models: their special tokens, their limits, and texts that are longer."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    PreTrainedTokenizerFast,
    RobertaConfig,
    XLNetConfig,
)

from tieback.reward_model.encoding import encode, encode_pairs, longest_text
from tieback.reward_model.head import load_reward_model
from tieback.reward_model.scoring import RewardScorer

WORDS = [f"w{number}" for number in range(40)]
SIZES: dict[str, Any] = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "num_labels": 1, "initializer_range": 0.5}  # fmt: skip
# Special tokens that the tokenizer writes around a text, its names for them, a config, and the longest text.
KINDS: dict[str, tuple[str, dict[str, str], Any, int | None]] = {
    "BERT": ("[CLS] $A [SEP]", {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}, BertConfig(**SIZES, max_position_embeddings=16), 16),
    "DeBERTa": ("[CLS] $A [SEP]", {"cls_token": "[CLS]", "sep_token": "[SEP]", "eos_token": "[SEP]", "pad_token": "[PAD]"}, DebertaV2Config(**SIZES, max_position_embeddings=16), 16),
    "RoBERTa": ("<s> $A </s>", {"bos_token": "<s>", "cls_token": "<s>", "sep_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}, RobertaConfig(**SIZES, max_position_embeddings=18, pad_token_id=1), 16),
    "XLNet": ("$A <sep> <cls>", {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "<sep>", "cls_token": "<cls>", "pad_token": "<pad>"}, XLNetConfig(vocab_size=60, d_model=16, n_layer=1, n_head=2, d_inner=16, num_labels=1, initializer_range=0.5), None),
}  # fmt: skip
SPECIAL = ["[PAD]", "<pad>", "[CLS]", "[SEP]", "<s>", "</s>", "<sep>", "<cls>", "[UNK]"]


def reward_model(kind: str) -> tuple[Any, PreTrainedTokenizerFast]:
    template, names, config, _ = KINDS[kind]
    vocabulary = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(
        single=template, special_tokens=[(token, vocabulary[token]) for token in SPECIAL if token in template]
    )
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    return model, PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def text(first: int, count: int) -> str:
    return " ".join(WORDS[(first + 7 * place) % len(WORDS)] for place in range(count))


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_has_the_special_tokens_that_its_tokenizer_writes_and_no_more(kind: str) -> None:
    _, tokenizer = reward_model(kind)
    assert encode(tokenizer, "w1 w2", " w3") == tokenizer("w1 w2 w3")["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_limit_is_the_longest_text_that_the_model_can_read(kind: str) -> None:
    model, tokenizer = reward_model(kind)
    limit = KINDS[kind][3]
    assert longest_text(model, tokenizer) == limit
    if kind in ("BERT", "RoBERTa"):  # the others have relative positions
        scorer = RewardScorer(model, tokenizer, max_length=limit + 1)  # type: ignore[operator]
        with pytest.raises((IndexError, RuntimeError)):
            scorer.score([text(0, 30)], [""])
    tokenizer.model_max_length = 9
    assert longest_text(model, tokenizer) == 9


@pytest.mark.parametrize("kind", KINDS)
def test_a_longer_text_is_cut_as_its_tokenizer_cuts_on_the_left(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = reward_model(kind)
    scorer = RewardScorer(model, tokenizer, max_length=KINDS[kind][3] or 16)
    prompts, completions = [text(0, 25), text(3, 40)], [" " + text(11, 6), " w2"]
    with caplog.at_level(logging.WARNING):
        scores = scorer.score(prompts, completions)
    assert len([record for record in caplog.records if "beginning is cut" in record.message]) == 1
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, truncation_side="left", **KINDS[kind][1])  # fmt: skip
    for prompt, completion, score in zip(prompts, completions, scores, strict=True):
        ids = torch.tensor([own(prompt + completion, truncation=True, max_length=16)["input_ids"]])
        assert ids.shape[1] == 16
        with torch.no_grad():
            assert score == pytest.approx(model(ids).logits.item(), abs=1e-6)


def test_pairs_are_cut_as_scored_texts_are() -> None:
    _, tokenizer = reward_model("RoBERTa")
    rows = Dataset.from_list([{"prompt": text(0, 30), "chosen": " w1", "rejected": " w2 w3"}])
    encoded, dropped = encode_pairs(rows, tokenizer, 16)
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, truncation_side="left", **KINDS["RoBERTa"][1])  # fmt: skip
    assert dropped == 0
    for side in ("chosen", "rejected"):
        expected = own(rows[0]["prompt"] + rows[0][side], truncation=True, max_length=16)["input_ids"]
        assert encoded[0][f"{side}_ids"] == expected


def test_a_reward_model_of_an_encoder_is_saved_and_scores_the_same(tmp_path: Path) -> None:
    model, tokenizer = reward_model("RoBERTa")
    model.save_pretrained(tmp_path)
    again = RewardScorer(load_reward_model(tmp_path), tokenizer).score(["w1 w2"], [" w3"])
    assert again == pytest.approx(RewardScorer(model, tokenizer).score(["w1 w2"], [" w3"]), abs=1e-6)
