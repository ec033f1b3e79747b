"""All questions of the help desk: a space of prompts that is walked without repeats and parted into splits.

A question is a fact in one phrasing, with an opening and a closing phrase around it. The prompt's text alone
decides its split, so splits share no prompt whatever the seeds and sizes they are made with.
"""

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from tieback.data.errors import DataError
from tieback.data.helpdesk import phrases
from tieback.data.helpdesk.families import Fact, Family, families

SPLIT_SHARES = {"demonstrations": 0.35, "preferences": 0.2, "ppo": 0.35, "evaluation": 0.1}


@dataclass(frozen=True)
class Question:
    """One prompt of the help desk and the fact behind it."""

    family: Family
    fact: Fact
    prompt: str


def capitalise(text: str) -> str:
    """Return `text` with its first letter in upper case and the rest as it is."""
    return text[:1].upper() + text[1:]


def fill(template: str, fact: Fact, **more: str) -> str:
    """Fill a template with a fact's slots (and `{kind_a}`, its kind with the article) and capitalise it."""
    kind = fact.slots.get("kind", "")
    article = "an" if kind[:1] in ("a", "e", "i", "o", "u") else "a"
    return capitalise(template.format(**fact.slots, kind_a=f"{article} {kind}", **more))


def split_of(prompt: str) -> str:
    """Name of the split that a prompt belongs to: a hash of its text, on the shares of `SPLIT_SHARES`."""
    position = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") / 2**64
    bounds = accumulate(SPLIT_SHARES.values())
    return next(
        (name for name, bound in zip(SPLIT_SHARES, bounds, strict=True) if position < bound), "evaluation"
    )


def _question(family: Family, index: int) -> Question:
    """Question number `index` of a family: its digits in a mixed radix choose closing, opening, template, fact."""
    index, closer = divmod(index, len(phrases.PROMPT_CLOSERS))
    index, opener = divmod(index, len(phrases.PROMPT_OPENERS))
    index, template = divmod(index, len(family.questions))
    fact = family.facts[index]
    parts = (
        phrases.PROMPT_OPENERS[opener],
        fill(family.questions[template], fact),
        phrases.PROMPT_CLOSERS[closer],
    )
    return Question(family, fact, " ".join(part for part in parts if part))


def _num_questions(family: Family) -> int:
    return (
        len(family.facts) * len(family.questions) * len(phrases.PROMPT_OPENERS) * len(phrases.PROMPT_CLOSERS)
    )


def _walk(family: Family, split: str, rng: random.Random) -> Iterator[Question]:
    """Yield the family's questions of a split once each, in an order drawn from `rng`.

    The order is that of i → (start + i·step) mod n, with step coprime to n: no memory, and no number twice.
    """
    n = _num_questions(family)
    start = rng.randrange(n)
    step = rng.randrange(n)
    while math.gcd(step, n) != 1:
        step = rng.randrange(n)
    for i in range(n):
        question = _question(family, (start + i * step) % n)
        if split_of(question.prompt) == split:
            yield question


def draw_questions(split: str, size: int, rng: random.Random) -> list[Question]:
    """Draw `size` different questions of a split, the families in equal shares as long as each has some left.

    Raises:
        DataError: no such split, or it has fewer than `size` questions.
    """
    if split not in SPLIT_SHARES:
        raise DataError(f"helpdesk has no split {split!r}; its splits are {', '.join(SPLIT_SHARES)}.")
    walks = [_walk(family, split, rng) for family in families().values()]
    drawn: list[Question] = []
    while len(drawn) < size:
        if not walks:
            raise DataError(
                f"helpdesk's split {split!r} has {len(drawn)} different prompts, {size} were asked for: "
                f"ask for at most {len(drawn)}."
            )
        for walk in list(walks):
            question = next(walk, None)
            if question is None:
                walks.remove(walk)
            else:
                drawn.append(question)
    del drawn[size:]
    rng.shuffle(drawn)
    return drawn
