"""The simulated annotator: Bradley–Terry by the closed form, and about as reliable as people."""

import math
import random
from itertools import combinations

import pytest

from tieback.data.helpdesk import ANNOTATORS, annotate, gold_scores, rank
from tieback.data.helpdesk.annotator import Annotator
from tieback.data.helpdesk.demonstrations import write_completion
from tieback.data.helpdesk.questions import draw_questions


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.fixture(scope="module")
def judged():
    """Responses to 800 questions, four each, drawn as the demonstrations are, and their gold totals."""
    rng = random.Random(0)
    judged = []
    for question in draw_questions("preferences", 800, random.Random(1)):
        responses = [write_completion(question, rng) for _ in range(4)]
        totals = [
            gold_scores(question.prompt, text, question.family.name, question.fact.answers).total
            for text in responses
        ]
        judged.append((question.prompt, responses, totals))
    return judged


def labelled_pairs(judged, seed=0):
    """Yield (annotator, text and gold total of the preferred response, of the other) for each pair of each prompt."""
    for prompt, responses, totals in judged:
        ((ranks, annotator),) = annotate(totals, seed, prompt)
        for i, j in combinations(range(len(responses)), 2):
            better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
            if responses[better] != responses[worse]:
                yield annotator, (responses[better], totals[better]), (responses[worse], totals[worse])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_agreement_with_the_gold_order_is_that_of_people(judged, seed):
    agreed = [
        better[1] > worse[1]
        for _, better, worse in labelled_pairs(judged, seed)
        if abs(better[1] - worse[1]) > 1e-9
    ]
    assert len(agreed) > 4000
    assert 0.7 < sum(agreed) / len(agreed) < 0.8


def test_annotators_differ_in_reliability(judged):
    agreed = {annotator.name: [] for annotator in ANNOTATORS}
    for name, better, worse in labelled_pairs(judged):
        if abs(better[1] - worse[1]) > 1e-9:
            agreed[name].append(better[1] > worse[1])
    rates = [sum(flags) / len(flags) for flags in agreed.values()]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > rates[-1] + 0.03
    assert rates[-1] > 0.64
    assert rates[0] < 0.84


def test_choosing_the_longer_response_is_no_way_to_predict_the_labels(judged):
    longer = [
        0.5 if len(better[0]) == len(worse[0]) else float(len(better[0]) > len(worse[0]))
        for _, better, worse in labelled_pairs(judged)
    ]
    assert 0.4 < sum(longer) / len(longer) < 0.6


@pytest.mark.parametrize("flip", [0.0, 0.2])
@pytest.mark.parametrize("gap", [0.0, 0.1, 0.4])
def test_two_responses_are_ordered_with_the_bradley_terry_probability(gap, flip):
    annotator = Annotator("a", temperature=0.2, flip_probability=flip)
    rng = random.Random(5)
    draws = 20_000
    firsts = sum(rank([0.5 + gap, 0.5], rng, annotator) == [1, 2] for _ in range(draws))
    expected = (1 - flip) * sigmoid(gap / 0.2) + flip * (1 - sigmoid(gap / 0.2))
    assert firsts / draws == pytest.approx(expected, abs=4 * math.sqrt(0.25 / draws))


def test_three_responses_are_ordered_as_plackett_and_luce_say():
    annotator = Annotator("a", temperature=0.5, flip_probability=0.0)
    totals = [0.2, 0.9, 0.5]
    weights = [math.exp(total / 0.5) for total in totals]
    expected = weights[1] / sum(weights) * weights[0] / (weights[0] + weights[2])
    rng = random.Random(6)
    draws = 20_000
    seen = sum(rank(totals, rng, annotator) == [2, 1, 3] for _ in range(draws)) / draws
    assert seen == pytest.approx(expected, abs=4 * math.sqrt(expected / draws))


def test_without_noise_the_ranks_are_those_of_gold():
    exact = Annotator("a", temperature=1e-9, flip_probability=0.0)
    assert rank([0.3, 0.9, 0.1, 0.5], random.Random(0), exact) == [3, 1, 4, 2]
    assert rank([0.3], random.Random(0)) == [1]


def test_annotating_depends_on_the_seed_and_the_prompt_alone():
    totals = [0.1, 0.2, 0.3, 0.4]
    first = annotate(totals, 0, "p1")
    annotate(totals, 0, "p2")
    assert annotate(totals, 0, "p1") == first
    assert sorted(first[0][0]) == [1, 2, 3, 4]
    others = [annotate(totals, 0, f"p{n}")[0] for n in range(60)]
    assert len({tuple(ranks) for ranks, _ in others}) > 10
    assert {name for _, name in others} == {annotator.name for annotator in ANNOTATORS}
    assert [annotate(totals, 1, f"p{n}")[0] for n in range(60)] != others


def test_several_annotators_rank_one_prompt_each_by_themselves():
    totals = [0.1, 0.2, 0.3, 0.4]
    rankings = [annotate(totals, 0, f"p{n}", num_annotators=3) for n in range(60)]
    for ranked in rankings:
        assert {name for _, name in ranked} == {annotator.name for annotator in ANNOTATORS}
    assert any(len({tuple(ranks) for ranks, _ in ranked}) > 1 for ranked in rankings)
