"""Active choice: the items that reward models are least sure of come first."""

import math

import numpy as np
import pytest

from tieback.cli.errors import UsageError
from tieback.pipeline.labelling import ordering
from tieback.pipeline.labelling.items import Item, content_hash
from tieback.pipeline.labelling.ordering import most_uncertain_first, uncertainty
from tieback.reward_model.scoring import RewardScorer


def test_one_model_is_least_sure_where_its_scores_are_equal():
    assert uncertainty(np.array([[0.7, 0.7, 0.7]])) == pytest.approx(1)
    assert uncertainty(np.array([[0.0, 50.0]])) == pytest.approx(0, abs=1e-12)
    p = 1 / (1 + math.exp(-1.5))
    assert uncertainty(np.array([[2.0, 0.5]])) == pytest.approx(4 * p * (1 - p))
    assert uncertainty(np.array([[0.5, 2.0]])) == pytest.approx(4 * p * (1 - p))


def test_several_models_are_least_sure_where_they_disagree():
    agreed = np.array([[3.0, 0.0, -3.0], [3.0, 0.0, -3.0]])
    opposed = np.array([[3.0, 0.0, -3.0], [-3.0, 0.0, 3.0]])
    undecided = np.zeros((2, 3))
    assert uncertainty(agreed) == uncertainty(undecided) == 0
    assert uncertainty(opposed) > 0.4
    assert uncertainty(agreed + 100) == pytest.approx(0), "a model's zero point means nothing"


class LengthScorer(RewardScorer):
    """Scores a response by its length."""

    def __init__(self):
        pass

    def score(self, prompts, completions):
        assert len(prompts) == len(completions)
        return [float(len(text if isinstance(text, str) else text[0]["content"])) for text in completions]


def item(*responses, prompt="?"):
    return Item(content_hash(prompt, responses), {"prompt": prompt, "responses": list(responses)})


def test_items_come_in_the_order_of_uncertainty(monkeypatch):
    monkeypatch.setattr(ordering, "load_reward_scorer", lambda name, *_: LengthScorer())
    chat = [{"role": "user", "content": "?"}]
    sure, unsure, between = (
        item("a", "b" * 9, "c" * 18),
        item("aa", "bb", prompt=chat),
        item("a", "bb", "ccc"),
    )
    assert most_uncertain_first([sure, unsure, between], ["any"]) == [unsure, between, sure]


def test_a_function_has_no_uncertainty_and_is_refused():
    with pytest.raises(UsageError, match="uncertain_to: builtins:len is a function; name reward models"):
        most_uncertain_first([item("a", "b")], ["builtins:len"])
