"""Demonstrations as people write them: right and wrong, courteous and curt, brief and rambling, evasive."""

import random
from typing import Any

from tieback.data.helpdesk import phrases
from tieback.data.helpdesk.questions import Question, capitalise, fill

_KINDS = {"right": 0.7, "wrong": 0.16, "evasive": 0.06, "two answers": 0.04, "repeated": 0.04}
_FORMS = {"full": 0.48, "short": 0.28, "curt": 0.24}
_OPENER_PROBABILITY = 0.35
_CLOSER_PROBABILITY = 0.35
_NO_FULL_STOP_PROBABILITY = 0.08
_NUM_FILLERS = {0: 0.66, 1: 0.26, 2: 0.08}


def _pick(weights: dict[Any, float], rng: random.Random) -> Any:
    return rng.choices(list(weights), list(weights.values()))[0]


def _answer(question: Question, answer: str, form: str, rng: random.Random) -> str:
    if form == "full":
        return fill(rng.choice(question.family.statements), question.fact, x=answer)
    return capitalise(f"It is {answer}." if form == "short" else f"{answer}.")


def write_completion(question: Question, rng: random.Random) -> str:
    """Write one person's answer to a question."""
    kind = _pick(_KINDS, rng)
    form = _pick(_FORMS, rng)
    right = rng.choice(question.fact.answers)
    wrong = rng.choice(question.fact.wrong)
    if kind == "evasive":
        core = rng.choice(phrases.EVASIONS)
    elif kind == "two answers":
        pair = [right, wrong]
        rng.shuffle(pair)
        core = _answer(question, " or ".join(pair), form, rng)
    else:
        core = _answer(question, wrong if kind == "wrong" else right, form, rng)
        if kind == "repeated":
            core = " ".join([core] * (2 if form == "full" else 3))

    num_fillers = 0 if kind == "repeated" else _pick(_NUM_FILLERS, rng)
    parts = [core, *rng.sample(phrases.FILLERS, num_fillers)]
    if rng.random() < _OPENER_PROBABILITY:
        parts.insert(0, rng.choice(phrases.OPENERS))
    if rng.random() < _CLOSER_PROBABILITY:
        parts.append(rng.choice(phrases.CLOSERS))
    text = " ".join(parts)
    return text[:-1] if rng.random() < _NO_FULL_STOP_PROBABILITY else text
