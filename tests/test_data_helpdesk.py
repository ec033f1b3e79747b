"""The built-in world: deterministic, disjoint splits of every family, with demonstrations as people write them."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict

import pytest

from tieback.data.errors import DataError
from tieback.data.helpdesk import SPLITS, gold_scores, make_split, phrases
from tieback.data.helpdesk.families import families
from tieback.data.helpdesk.questions import split_of

SIZES = {"demonstrations": 3000, "preferences": 2000, "ppo": 4000, "evaluation": 1000}


@pytest.fixture(scope="module")
def splits():
    return {split: make_split(split, size, seed=0) for split, size in SIZES.items()}


@pytest.fixture(scope="module")
def scores(splits):
    rows = splits["demonstrations"]
    return [
        gold_scores(prompt[0]["content"], completion[0]["content"], family, answer)
        for prompt, completion, family, answer in zip(
            rows["prompt"], rows["completion"], rows["family"], rows["answer"], strict=True
        )
    ]


def texts(dataset, column="prompt"):
    return [messages[0]["content"] for messages in dataset[column]]


def test_there_are_at_least_eight_families_and_each_split_holds_them_in_equal_shares(splits):
    assert len(families()) >= 8
    for dataset in splits.values():
        counts = Counter(dataset["family"])
        assert set(counts) == set(families())
        assert max(counts.values()) - min(counts.values()) <= 1


def test_columns_and_messages(splits):
    for split, dataset in splits.items():
        assert len(dataset) == SIZES[split]
        assert ("completion" in dataset.column_names) == (split == "demonstrations")
        assert {"prompt", "family", "answer"} <= set(dataset.column_names)
    row = splits["demonstrations"][0]
    assert [message["role"] for message in row["prompt"] + row["completion"]] == ["user", "assistant"]
    assert row["answer"]


def test_no_prompt_comes_twice_within_a_split_or_in_two_splits(splits):
    prompts = [text for dataset in splits.values() for text in texts(dataset)]
    assert len(set(prompts)) == len(prompts)


def test_splits_stay_disjoint_whatever_the_seeds_and_sizes(splits):
    evaluation = set(texts(splits["evaluation"]))
    for split in ("demonstrations", "preferences", "ppo"):
        assert evaluation.isdisjoint(texts(make_split(split, 1500, seed=7)))
    assert all(split_of(text) == "evaluation" for text in evaluation)


def test_the_splits_have_their_shares_of_the_world():
    counts = Counter(split_of(f"question {n}") for n in range(20_000))
    shares = {split: counts[split] / 20_000 for split in SPLITS}
    assert shares == pytest.approx(
        {"demonstrations": 0.35, "preferences": 0.2, "ppo": 0.35, "evaluation": 0.1}, abs=0.015
    )


def test_facts_of_the_evaluation_were_demonstrated_in_other_phrasings(splits):
    shown, asked = (
        {
            (family, tuple(answer))
            for family, answer in zip(splits[split]["family"], splits[split]["answer"], strict=True)
        }
        for split in ("demonstrations", "evaluation")
    )
    assert asked <= shown


def test_the_seed_decides_the_rows():
    assert make_split("ppo", 50, seed=1)[:] == make_split("ppo", 50, seed=1)[:]
    assert texts(make_split("ppo", 50, seed=1)) != texts(make_split("ppo", 50, seed=2))


@pytest.mark.slow
def test_another_process_with_another_hash_seed_makes_the_same_rows(splits):
    program = (
        "import hashlib, json; from tieback.data.helpdesk import make_split; "
        "print(hashlib.sha256(json.dumps(make_split('demonstrations', 3000, 0)[:]).encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    printed = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout
    here = hashlib.sha256(json.dumps(splits["demonstrations"][:]).encode()).hexdigest()
    assert printed.strip().splitlines()[-1] == here


def test_a_size_beyond_the_world_is_refused_with_the_largest_that_it_has():
    with pytest.raises(
        DataError, match=r"'evaluation' has (\d+) different prompts, 1000000 were asked for"
    ) as error:
        make_split("evaluation", 1_000_000, seed=0)
    largest = int(str(error.value).rsplit(" ", 1)[-1].rstrip("."))
    assert largest > 4000
    assert len(set(texts(make_split("evaluation", largest, seed=3)))) == largest


def test_the_world_holds_over_twenty_thousand_prompts_for_ppo():
    assert len(make_split("ppo", 20_000, seed=0)) == 20_000


def test_an_unknown_split_is_refused():
    with pytest.raises(DataError, match="helpdesk has no split 'train'; its splits are demonstrations"):
        make_split("train", 10, seed=0)


def test_a_right_answer_in_each_form_is_correct_and_a_wrong_one_is_not():
    for family in families().values():
        for fact in family.facts:
            question = family.questions[0].format(**fact.slots, kind_a=f"a {fact.slots.get('kind')}")
            forms = [*family.statements, "{x}.", "It is {x}."]
            for form in forms:
                for answer in fact.answers:
                    response = form.format(**fact.slots, kind_a=f"a {fact.slots.get('kind')}", x=answer)
                    assert gold_scores(question, response, family.name, fact.answers).correctness == 1, (
                        response
                    )
                for answer in fact.wrong[:4]:
                    response = form.format(**fact.slots, kind_a=f"a {fact.slots.get('kind')}", x=answer)
                    assert gold_scores(question, response, family.name, fact.answers).correctness == 0, (
                        response
                    )


def test_no_wrong_answer_is_an_accepted_one():
    for family in families().values():
        for fact in family.facts:
            assert fact.wrong
            assert not set(fact.wrong) & set(fact.answers)


def test_the_phrases_around_questions_and_answers_hold_no_candidate_answer():
    around = (
        *phrases.PROMPT_OPENERS,
        *phrases.PROMPT_CLOSERS,
        *phrases.OPENERS,
        *phrases.CLOSERS,
        *phrases.FILLERS,
        *phrases.EVASIONS,
    )
    for family in families().values():
        assert not [text for text in around if family.mention.search(text)]


def test_demonstrations_are_a_mixture(splits, scores):
    answered = splits["demonstrations"]["completion"]
    total = len(scores)
    assert 0.6 < sum(score.correctness for score in scores) / total < 0.8
    evasive = sum(bool(phrases.EVASION_PATTERN.search(text[0]["content"])) for text in answered) / total
    opened = sum(text[0]["content"].startswith(phrases.OPENERS) for text in answered) / total
    rambling = (
        sum(any(filler[:-1] in text[0]["content"] for filler in phrases.FILLERS) for text in answered) / total
    )
    curt = sum(len(text[0]["content"].split()) <= 2 for text in answered) / total
    assert 0.03 < evasive < 0.15
    assert 0.2 < opened < 0.5
    assert 0.2 < rambling < 0.5
    assert 0.05 < curt < 0.3
    assert sum(score.total > 0.97 for score in scores) / total < 0.08


def test_every_family_is_mostly_answered_right_and_sometimes_wrong(splits, scores):
    by_family = defaultdict(list)
    for family, score in zip(splits["demonstrations"]["family"], scores, strict=True):
        by_family[family].append(score.correctness)
    for family, correct in by_family.items():
        assert 0.55 < sum(correct) / len(correct) < 0.85, family
