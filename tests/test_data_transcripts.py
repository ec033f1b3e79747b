"""Anthropic-style transcripts: turned into conversations with a shared prompt, the odd ones dropped and counted."""

import pytest

from tieback.data.conversations import is_transcript, parse_transcript, shared_prompt
from tieback.data.files import Record
from tieback.data.formats import convert


def transcript(*turns):
    return "".join(f"\n\n{'Human' if i % 2 == 0 else 'Assistant'}: {turn}" for i, turn in enumerate(turns))


def messages(*turns):
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": turn} for i, turn in enumerate(turns)]


def run(pairs, kind="preferences"):
    rows = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    return convert([Record(f"line {n}", row) for n, row in enumerate(rows)], kind, "hh.jsonl")


def test_turns_keep_their_paragraphs_and_colons():
    text = transcript("Bake bread?", "Mix:\n\n1. flour\n\n2. water", "Human: then?", "Bake.")
    assert parse_transcript(text) == messages(
        "Bake bread?", "Mix:\n\n1. flour\n\n2. water", "Human: then?", "Bake."
    )


def test_neighbouring_turns_of_one_speaker_become_one():
    text = "\n\nHuman: a\n\nHuman: b\n\nAssistant: c\n\nAssistant:\n\nAssistant: d"
    assert parse_transcript(text) == messages("a\n\nb", "c\n\nd")


@pytest.mark.parametrize(
    "text", ["Human beings are many.", "Human: hello", "The sky", "", None, ["Human:"], "Human:\n\nhello"]
)
def test_ordinary_text_is_no_transcript(text):
    assert not is_transcript(text)


def test_the_usual_pair_shares_all_but_its_last_turn():
    rows, dropped = run([(transcript("a", "b", "c", "good"), transcript("a", "b", "c", "bad"))])
    assert not dropped
    assert rows[0]["prompt"] == messages("a", "b", "c")
    assert rows[0]["chosen"] == [{"role": "assistant", "content": "good"}]
    assert rows[0]["rejected"] == [{"role": "assistant", "content": "bad"}]


def test_pairs_that_part_earlier_or_differ_in_length_keep_several_turns():
    rows, dropped = run(
        [
            (transcript("a", "b", "c", "d"), transcript("a", "x", "c", "d")),
            (transcript("a", "b", "c", "d", "e", "f"), transcript("a", "b", "c", "g")),
            (transcript("a", "b", "c", "d"), transcript("a", "b", "other", "d")),
        ]
    )
    assert not dropped
    assert [len(row["prompt"]) for row in rows] == [1, 3, 1]
    assert [(len(row["chosen"]), len(row["rejected"])) for row in rows] == [(3, 3), (3, 1), (3, 3)]
    for row in rows:
        assert row["prompt"][-1]["role"] == "user"
        assert row["chosen"][0]["role"] == row["rejected"][0]["role"] == "assistant"


def test_one_transcript_inside_the_other_shares_the_prompt_before_its_answer():
    rows, _ = run([(transcript("a", "b", "c", "d"), transcript("a", "b"))])
    assert rows[0]["prompt"] == messages("a")
    assert rows[0]["rejected"] == [{"role": "assistant", "content": "b"}]
    assert len(rows[0]["chosen"]) == 3


def test_odd_pairs_are_dropped_under_their_reason():
    good = (transcript("a", "b"), transcript("a", "c"))
    rows, dropped = run(
        [
            good,
            (transcript("a", "b"), transcript("a", "b")),
            (transcript("a", "b"), transcript("a", "b  ")),
            (transcript("a", ""), transcript("a", "b")),
            (transcript("a", "b", "c"), transcript("a", "x")),
            (transcript("a", "b"), transcript("z", "b")),
            (transcript("", "b"), transcript("", "c")),
            (transcript("a", "", "c", "d"), transcript("a", "", "c", "e")),
        ]
    )
    assert len(rows) == 1
    assert dropped == {
        "identical": 2,
        "empty_chosen": 1,
        "no_response": 1,
        "no_shared_prompt": 1,
        "empty_turn": 2,
    }


def test_transcripts_serve_as_demonstrations_and_prompts():
    pair = (transcript("a", "b", "c", "good"), transcript("a", "b", "c", "bad"))
    assert run([pair], "demonstrations")[0] == [
        {"prompt": messages("a", "b", "c"), "completion": [{"role": "assistant", "content": "good"}]}
    ]
    assert run([pair, pair], "prompts") == ([{"prompt": messages("a", "b", "c")}], {"repeated_prompt": 1})


def test_a_transcript_as_the_prompt_loses_its_open_turn():
    record = Record("line 1", {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"})
    assert convert([record], "prompts", "hh")[0] == [{"prompt": messages("a", "b", "c")}]


def test_a_shared_prompt_ends_before_an_answer():
    assert shared_prompt(messages("a", "b", "c", "d"), messages("a", "b", "x", "d")) == messages("a")
    assert shared_prompt(messages("a", "b"), messages("x", "b")) == []
    assert shared_prompt(messages("a", "b"), messages("a", "b")) == messages("a")
