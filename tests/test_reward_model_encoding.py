"""Pairs as tokens: cut to the limit, and dropped where the cut makes them identical."""

import pytest
from datasets import Dataset

from tieback.data.errors import DataError
from tieback.data.tokenizer import train_tokenizer
from tieback.reward_model import encoding
from tieback.reward_model.encoding import encode, encode_pairs


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["What is it?", "It is this.", "It is that."], 300)


def ids(tokenizer, text):
    return tokenizer(text)["input_ids"]


def test_plain_pairs_end_with_eos_once(tokenizer):
    rows = Dataset.from_list([{"prompt": "What?", "chosen": " This.", "rejected": " That.<|end|>"}])
    encoded, dropped = encode_pairs(rows, tokenizer, 100)
    assert dropped == 0
    assert encoded[0]["chosen_ids"] == ids(tokenizer, "What? This.<|end|>")
    assert encoded[0]["rejected_ids"] == ids(tokenizer, "What? That.<|end|>")


def test_conversational_pairs_go_through_the_chat_template(tokenizer):
    rows = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": "What?"}],
                "chosen": [{"role": "assistant", "content": "This."}],
                "rejected": [{"role": "assistant", "content": "That."}],
            }
        ]
    )
    encoded, _ = encode_pairs(rows, tokenizer, 100)
    assert encoded[0]["chosen_ids"] == ids(tokenizer, "<|user|>What?<|end|><|assistant|>This.<|end|>")


def test_pairs_that_the_cut_makes_identical_are_dropped_and_counted(tokenizer):
    rows = Dataset.from_list(
        [
            {"prompt": "a", "chosen": "xbc", "rejected": "ybc"},
            {"prompt": "a", "chosen": "x", "rejected": "y"},
            {"prompt": "abc", "chosen": "xdef", "rejected": "ydef"},
        ]
    )
    encoded, dropped = encode_pairs(rows, tokenizer, 3)
    assert dropped == 2
    assert encoded["prompt"][:] == ["a"]
    assert encoded["chosen_ids"][:] == [ids(tokenizer, "ax<|end|>")]
    assert encode_pairs(rows, tokenizer, 5)[1] == 0
    assert encode_pairs(rows, tokenizer, 5)[0]["chosen_ids"][2] == ids(tokenizer, "xdef<|end|>")
    assert encode_pairs(rows, tokenizer, None)[0]["chosen_ids"][2] == ids(tokenizer, "abcxdef<|end|>")


def test_where_the_cut_leaves_no_pair_the_message_says_what_to_raise(tokenizer):
    rows = Dataset.from_list([{"prompt": "abc", "chosen": "xde", "rejected": "yde"}])
    with pytest.raises(
        DataError, match=r"All 1 pairs are identical in their last 3 tokens.*Raise max_length"
    ):
        encode_pairs(rows, tokenizer, 3)


def test_a_text_of_several_pairs_is_tokenized_once(tokenizer, monkeypatch):
    texts = []

    def counted(tokenizer, prompt, completion):
        texts.append((prompt, completion))
        return encode(tokenizer, prompt, completion)

    monkeypatch.setattr(encoding, "encode", counted)
    pairs = [("q", "a", "b"), ("q", "a", "c"), ("q", "b", "c"), ("qa", "b", "c"), ("q", "ab", "c")]
    rows = Dataset.from_list(
        [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in pairs]
    )
    encoded, _ = encode_pairs(rows, tokenizer, None)
    assert sorted(texts) == sorted({(prompt, side) for prompt, *sides in pairs for side in sides})
    assert encoded["chosen_ids"][:] == [
        ids(tokenizer, text) for text in ("qa<|end|>", "qa<|end|>", "qb<|end|>", "qab<|end|>", "qab<|end|>")
    ]
