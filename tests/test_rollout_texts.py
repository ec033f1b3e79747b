"""Prompts as token ids, and completions as the texts that people, reward functions and reward models read."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import toy
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tieback.pipeline import collect, evaluate
from tieback.pipeline.arguments import RECIPES
from tieback.pipeline.rollout.texts import decode_completions, encode_prompts
from tieback.reward_model.encoding import encode

WORDS = ["The", "capital", "of", "France", "is", "Paris", "a", "town", "on", "Seine"]
PROMPTS = ["The capital of France is", "a town", "Paris is a town on", "The Seine"]


def metaspace(normalizer: Any = None) -> PreTrainedTokenizerFast:
    """A Unigram tokenizer with Metaspace, as SentencePiece models have it: every word is one token, `▁word`."""
    core = Tokenizer(
        models.Unigram(
            [("<end>", 0.0), *((f"▁{word}", -1.0) for word in WORDS)], unk_id=1, byte_fallback=False
        )
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    if normalizer is not None:
        core.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>")


def is_prose(text: str) -> bool:
    """Whether words of the vocabulary stand with one space between them."""
    return all(word in WORDS for word in text.split(" "))


def decode(prompt: Any, prompt_ids: list[int], ids: list[int], tok: PreTrainedTokenizerFast) -> Any:
    (text,) = decode_completions([prompt], [prompt_ids], [ids], tok)
    return text


# Prompts.


def test_a_conversation_becomes_the_template_with_the_assistants_turn_begun() -> None:
    tok = toy.tokenizer()
    (ids,) = encode_prompts([[{"role": "user", "content": "red cat"}]], tok, {})
    assert tok.decode(ids) == "<|user|>red cat<|end|><|assistant|>"
    assert encode_prompts(["red cat"], tok, {}) == [tok.encode("red cat")]


def test_the_templates_arguments_reach_it() -> None:
    tok = toy.tokenizer()
    tok.chat_template = tok.chat_template + "{% if not enable_thinking %}{{ 'no' }}{% endif %}"
    prompts = [[{"role": "user", "content": "red cat"}]]
    (thinking,) = encode_prompts(prompts, tok, {"enable_thinking": True})
    (brief,) = encode_prompts(prompts, tok, {"enable_thinking": False})
    assert brief == [*thinking, *tok.encode("no")]


# Completions of a byte-level tokenizer.


def test_completions_have_the_shape_of_their_prompt_and_no_special_token() -> None:
    tok = toy.tokenizer()
    ids = [*tok.encode(" blue"), tok.eos_token_id]
    assert decode("red", tok.encode("red"), ids, tok) == " blue"
    prompt = [{"role": "user", "content": "red"}]
    assert decode(prompt, tok.encode("red"), ids, tok) == [{"role": "assistant", "content": " blue"}]


def test_bytes_that_are_no_character_change_nothing_for_a_byte_level_tokenizer() -> None:
    """Its tokens are bytes, so a completion reads the same behind any prompt, halves of characters included."""
    tok, generator = toy.tokenizer(), random.Random(0)
    for prompt in ("red", "café ", "二つ", "\n", "<|user|>red"):
        for _ in range(50):
            ids = generator.choices(range(len(tok)), k=6)
            assert decode(prompt, tok.encode(prompt), ids, tok) == tok.decode(ids, skip_special_tokens=True)


def test_a_completion_that_ends_a_character_of_its_prompt_is_read_alone() -> None:
    tok = toy.tokenizer()
    first, second = tok.encode("é")
    assert tok.decode([first, second]) == "é"
    assert decode("?", [*tok.encode("caf"), first], [second, *tok.encode(" red")], tok) == "\ufffd red"


# Completions of a SentencePiece tokenizer.


def test_the_space_between_a_plain_prompt_and_its_completion_is_kept() -> None:
    tok = metaspace()
    prompt = "The capital of France is"
    ids = tok.convert_tokens_to_ids(["▁Paris", "▁on", "▁Seine"])
    assert decode(prompt, tok.encode(prompt), [*ids, tok.eos_token_id], tok) == " Paris on Seine"
    assert decode(prompt, tok.encode(prompt), [tok.eos_token_id], tok) == ""
    # Alone, the first token would lose it.
    assert tok.decode(ids) == "Paris on Seine"


def test_a_message_of_the_assistants_begins_without_a_space() -> None:
    tok = metaspace()
    ids = [tok.convert_tokens_to_ids("▁Paris"), tok.eos_token_id]
    prompt = [{"role": "user", "content": "The capital of France is"}]
    assert decode(prompt, tok.encode(prompt[0]["content"]), ids, tok) == [
        {"role": "assistant", "content": "Paris"}
    ]


def test_a_prompt_that_the_normaliser_changes_is_cut_off_as_it_was_read() -> None:
    tok = metaspace(normalizers.Sequence([normalizers.Strip(), normalizers.Replace("the", "The")]))
    prompt = "the capital of France is \n"
    prompt_ids = tok.encode(prompt)
    assert tok.decode(prompt_ids) == "The capital of France is"
    assert decode(prompt, prompt_ids, [tok.convert_tokens_to_ids("▁Paris")], tok) == " Paris"


def test_reward_functions_and_reward_models_read_what_the_policy_wrote(tmp_path: Path) -> None:
    tok, seen = metaspace(), []

    def reward(
        prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any
    ) -> list[float]:
        seen.extend(zip(prompts, completions, completion_ids, strict=True))
        return [0.0] * len(prompts)

    trainer = toy.ppo_trainer(
        tmp_path,
        reward,
        model=toy.policy(tok),
        tok=tok,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS * 4}),
    )
    trainer.train()
    assert len(seen) == 16
    for prompt, completion, ids in seen:
        assert is_prose(prompt + completion)
        # The reward model reads the very tokens that were sampled, closed by EOS.
        expected = [*tok.encode(prompt), *ids]
        expected += [] if ids[-1] == tok.eos_token_id else [tok.eos_token_id]
        assert encode(tok, prompt, completion) == expected
    assert any(" " in completion for _, completion, _ in seen)


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with two policies and a reward model of a SentencePiece tokenizer, and plain prompts beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    tok = metaspace()
    for stage, model in (
        ("sft", toy.policy(tok)),
        ("ppo", toy.policy(tok, seed=1)),
        ("reward", toy.reward_model(tok)),
    ):
        model.save_pretrained(tmp_path / "run" / stage)
        tok.save_pretrained(tmp_path / "run" / stage)
        (tmp_path / "run" / stage / "metrics.json").write_text("{}")
    rows = [{"prompt": prompt} for prompt in PROMPTS * 4]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "run"


def run(stage: Any, run_dir: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> list[dict[str, Any]]:
    """Rows that the `main` of collect or evaluate writes."""
    name = stage.__name__.rpartition(".")[2]
    fixed = {
        "config": RECIPES / "smoke" / f"{name}.yaml",
        "run_dir": run_dir,
        "dataset_name": "prompts.jsonl",
    }
    argv = [part for key, value in {**fixed, **settings}.items() for part in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", [name, *argv])
    stage.main()
    path = run_dir / name / {"collect": "responses.jsonl", "evaluate": "samples.jsonl"}[name]
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_collected_responses_read_on_from_their_prompts(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = run(collect, run_dir, monkeypatch, dataset_train_split="train", annotator="none")
    assert len(rows) == 12
    responses = [(row["prompt"], response) for row in rows for response in row["responses"]]
    assert all(is_prose(prompt + response) for prompt, response in responses)
    assert any(response for _, response in responses)


def test_evaluated_responses_read_on_from_their_prompts(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = run_dir / "evaluate.yaml"
    recipe.write_text("num_resamples: 2000\nnum_examples: 2\nmax_completion_length: 6\n")
    rows = run(evaluate, run_dir, monkeypatch, config=recipe, dataset_test_split="train")
    assert len(rows) == 16
    responses = [(row["prompt"], row[system]["response"]) for row in rows for system in ("sft", "ppo")]
    assert all(is_prose(prompt + response) for prompt, response in responses)
    assert any(response for _, response in responses)
