"""The tokenizer: any text comes back, the chat template is what training and sampling need, and it reloads."""

import pytest
from transformers import AutoTokenizer

from tieback.data.helpdesk import make_split
from tieback.data.tokenizer import train_tokenizer

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "What is 12 plus 3?"},
    {"role": "assistant", "content": "It is 15."},
    {"role": "user", "content": "Thanks!"},
    {"role": "assistant", "content": "You are welcome!"},
]


@pytest.fixture(scope="module")
def texts():
    rows = make_split("demonstrations", 400, seed=0)
    return [row[0]["content"] for column in ("prompt", "completion") for row in rows[column]]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_tokenizer(texts, 600)


@pytest.mark.parametrize(
    "text",
    [
        "It is 15.",
        "  two  spaces\n\nand lines\t",
        "Größe, 漢字, 🙂",
        "c-a-t",
        "don't",
        " ",
        "007 + 3 = 10?",
        "\x00\x7f",
    ],
)
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_vocabulary_has_the_size_asked_for(texts, tokenizer):
    assert len(tokenizer) == 600
    with pytest.raises(ValueError, match="vocab_size is 200; it must be at least 261"):
        train_tokenizer(texts, 200)


def test_digits_stand_alone(tokenizer):
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("2024 and 31, 7")["input_ids"])
    digits = [piece for piece in pieces if any(char.isdigit() for char in piece)]
    assert len(digits) == 7


def test_frequent_words_are_one_token(tokenizer):
    assert len(tokenizer(" capital")["input_ids"]) == 1


def test_special_tokens(tokenizer):
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.bos_token is None
    for token in ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"):
        ids = tokenizer(token)["input_ids"]
        assert len(ids) == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == ""


def test_the_chat_template(tokenizer):
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == (
        "<|system|>Be kind.<|end|><|user|>What is 12 plus 3?<|end|><|assistant|>It is 15.<|end|>"
        "<|user|>Thanks!<|end|><|assistant|>You are welcome!<|end|>"
    )
    with pytest.raises(Exception, match="Unknown role: bot"):
        tokenizer.apply_chat_template([{"role": "bot", "content": "a"}], tokenize=False)


@pytest.mark.parametrize("turns", [2, 4])
def test_the_prompt_is_a_prefix_of_prompt_and_answer_in_text_and_tokens(tokenizer, turns):
    def ids(messages, **kwargs):
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)["input_ids"]

    prompt = ids(CHAT[:turns], add_generation_prompt=True)
    whole = ids(CHAT[: turns + 1])
    answer = tokenizer(CHAT[turns]["content"] + tokenizer.eos_token)["input_ids"]
    assert whole == prompt + answer
    assert prompt[-1] == tokenizer.convert_tokens_to_ids("<|assistant|>")


def test_the_template_marks_the_assistants_tokens_and_their_end(tokenizer):
    encoded = tokenizer.apply_chat_template(
        CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [id_ for id_, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == "It is 15.<|end|>You are welcome!<|end|>"


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "Hi! What is 12 + 3? Größe 🙂"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.apply_chat_template(CHAT, tokenize=False) == tokenizer.apply_chat_template(
        CHAT, tokenize=False
    )
    assert (loaded.pad_token_id, loaded.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.padding_side == "left"


def test_training_is_deterministic(texts, tokenizer):
    assert train_tokenizer(texts, 600).get_vocab() == tokenizer.get_vocab()
