"""Reward functions that recipes name."""

import sys

import pytest

from tieback.cli.errors import UsageError
from tieback.pipeline.scorers import load_scorer
from tieback.reward_functions import gsm8k, vader


def test_vader_scores_texts_and_messages_alike_from_bad_to_good() -> None:
    pytest.importorskip("vaderSentiment")
    function = load_scorer("tieback.reward_functions.vader:compound", 1)
    texts = ["This is a horrible, sad failure.", "It is a table.", "What a wonderful, happy day!"]
    scores = function(prompts=texts, completions=texts, completion_ids=[[0]] * 3, other=texts)  # type: ignore[operator]
    assert -1 <= scores[0] < -0.5 < scores[1] == 0 < 0.5 < scores[2] <= 1
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert vader.compound(messages) == scores


def test_vader_that_is_not_installed_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    vader._analyzer.cache_clear()
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(UsageError, match=r"VADER is not installed.*tieback\[pretrained\]"):
        vader.compound(["good"])
    vader._analyzer.cache_clear()


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("It is 6.\n#### 6", "2*3=<<2*3=6>>6\n#### 6", 1),
        ("#### 7", "#### 6", 0),
        ("#### 7, no: #### 6", "#### 6", 1),
        ("####6.0", "6", 1),
        ("#### $1,200", "#### 1200", 1),
        ("#### -3", "#### -3", 1),
        ("#### 3", "#### -3", 0),
        ("#### .5", "#### 0.5", 1),
        ("#### 60", "#### 6", 0),
        ("The answer is 6.", "#### 6", 0),
        ("#### six", "#### 6", 0),
        ("", "#### 6", 0),
    ],
)
def test_the_number_behind_the_last_mark_decides(completion: str, answer: str, score: float) -> None:
    messages = [{"role": "assistant", "content": completion}]
    assert gsm8k.exact([completion, messages], answer=[answer, answer], question=["", ""]) == [score, score]


def test_an_answer_without_a_number_is_named() -> None:
    with pytest.raises(UsageError, match=r"column `answer` .* has 'about six'"):
        gsm8k.exact(["#### 6"], answer=["about six"])
