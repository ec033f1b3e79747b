"""The families of question: their facts, how each is asked and answered, and how an answer is read.

An answer is read by two patterns. `mention` finds everything in a text that could be an answer of the family;
`restatement(prompt)` finds where a response merely repeats what was asked ("the capital of *France*", "*3 plus 4*",
"*after Monday*"). What is mentioned outside restatements is what the response claims.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import permutations

from data.helpdesk import facts as tables


@dataclass(frozen=True)
class Fact:
    """One fact: what fills the templates, the answers accepted, and wrong answers that people might give."""

    slots: dict[str, str]
    answers: tuple[str, ...]
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """One family of question.

    Args:
        questions: templates of the question, filled with a fact's slots.
        statements: templates of a full-sentence answer, filled with the slots and `{x}`, the answer given.
        mention: finds every candidate answer in a text.
        restatement: pattern, made for a prompt, of a response's repetition of the question.
    """

    name: str
    facts: tuple[Fact, ...]
    questions: tuple[str, ...]
    statements: tuple[str, ...]
    mention: re.Pattern[str]
    restatement: Callable[[str], re.Pattern[str]]


def words_pattern(words: Iterable[str]) -> re.Pattern[str]:
    """Pattern of any of `words` as whole words, the longest first."""
    return re.compile(
        rf"\b(?:{'|'.join(sorted(map(re.escape, words), key=len, reverse=True))})\b", re.IGNORECASE
    )


_NOTHING = re.compile(r"(?!)")


def _found(pattern: re.Pattern[str], text: str) -> list[str]:
    return [found.lower() for found in pattern.findall(text)]


def _table(
    name: str, table: dict[str, str], questions: tuple[str, ...], statements: tuple[str, ...]
) -> Family:
    """A family that looks a subject up in a table; the subject is what the prompt mentions."""
    values = list(dict.fromkeys(table.values()))
    facts = tuple(
        Fact({"s": key}, (value,), tuple(other for other in values if other not in (key, value)))
        for key, value in table.items()
    )
    mention = words_pattern({*(key.split()[-1] for key in table), *values})

    def restatement(prompt: str) -> re.Pattern[str]:
        subjects = _found(mention, prompt)
        return words_pattern(subjects) if subjects else _NOTHING

    return Family(name, facts, questions, statements, mention, restatement)


_NUMBER = re.compile(r"\d+")


def _near(answer: int) -> tuple[str, ...]:
    return tuple(str(answer + step) for step in (-2, -1, 1, 2) if answer + step >= 0)


def _sums() -> Family:
    def restatement(prompt: str) -> re.Pattern[str]:
        a, b = [*_found(_NUMBER, prompt), "-", "-"][:2]
        joint = r"\s*(?:plus|and|\+|added to)\s*"
        return re.compile(rf"\b(?:{a}{joint}{b}|{b}{joint}{a})\b")

    facts = tuple(
        Fact({"a": str(a), "b": str(b)}, (str(a + b),), _near(a + b))
        for a in range(1, 4)
        for b in range(1, 4)
    )
    return Family(
        "sum",
        facts,
        ("What is {a} plus {b}?", "How much is {a} + {b}?", "Add {a} and {b}.", "What do {a} and {b} make?"),
        ("{a} plus {b} is {x}.", "The sum of {a} and {b} is {x}.", "{a} + {b} makes {x}."),
        _NUMBER,
        restatement,
    )


def _differences() -> Family:
    def restatement(prompt: str) -> re.Pattern[str]:
        high, low = sorted([*_found(_NUMBER, prompt), "0", "0"][:2], key=int, reverse=True)
        return re.compile(
            rf"\b(?:{high}\s*(?:minus|-|less|take away|without)\s*{low}|{low}\s*(?:taken away |subtracted )?from\s*{high})\b"
        )

    facts = tuple(
        Fact({"a": str(a), "b": str(b)}, (str(a - b),), _near(a - b))
        for a in range(2, 5)
        for b in range(1, a)
    )
    return Family(
        "difference",
        facts,
        (
            "What is {a} minus {b}?",
            "How much is {a} - {b}?",
            "What do I get from {a} minus {b}?",
            "What is left of {a} without {b}?",
        ),
        ("{a} minus {b} is {x}.", "{a} minus {b} leaves {x}.", "{a} - {b} makes {x}."),
        _NUMBER,
        restatement,
    )


_LARGER = ("larger", "bigger", "greater", "higher")
_SMALLER = ("smaller", "lower")


def _comparisons() -> Family:
    mention = re.compile(rf"\d+|\b(?:{'|'.join(_LARGER + _SMALLER)})\b", re.IGNORECASE)

    def restatement(prompt: str) -> re.Pattern[str]:
        asked = _found(mention, prompt)
        smaller = any(word in _SMALLER for word in asked)
        numbers = [int(word) for word in asked if word.isdigit()]
        other = (max(numbers) if smaller else min(numbers)) if numbers else -1
        adjectives = "|".join(_SMALLER if smaller else _LARGER)
        return re.compile(rf"\b(?:{adjectives})\b(?: number)?(?: than {other}\b)?", re.IGNORECASE)

    facts = tuple(
        Fact(
            {"a": str(a), "b": str(b), "adj": adj},
            (answer,),
            (other,),
        )
        for a, b in permutations(range(1, 5), 2)
        for low, high in [sorted((a, b))]
        for adj, answer, other in (("larger", str(high), str(low)), ("smaller", str(low), str(high)))
    )
    return Family(
        "comparison",
        facts,
        (
            "Which is {adj}, {a} or {b}?",
            "Which number is {adj}: {a} or {b}?",
            "Tell me the {adj} number, {a} or {b}.",
            "Out of {a} and {b}, which is {adj}?",
        ),
        ("The {adj} number is {x}.", "The {adj} one is {x}.", "The {adj} of the two is {x}."),
        mention,
        restatement,
    )


def _sequences() -> Family:
    mention = words_pattern({*tables.DAYS, *tables.MONTHS, "after", "before"})

    def restatement(prompt: str) -> re.Pattern[str]:
        subjects = [word for word in _found(mention, prompt) if word not in ("after", "before")]
        return re.compile(rf"\bafter\b(?: {subjects[0]}\b)?", re.IGNORECASE) if subjects else _NOTHING

    facts = tuple(
        Fact(
            {"s": subject, "kind": kind},
            (ring[(i + 1) % len(ring)],),
            tuple(ring[(i + step) % len(ring)] for step in (-1, 2, 3)),
        )
        for kind, ring in (("day", tables.DAYS),)
        for i, subject in enumerate(ring)
    )
    return Family(
        "sequence",
        facts,
        (
            "Which {kind} comes after {s}?",
            "What {kind} is right after {s}?",
            "Name the {kind} after {s}.",
            "Can you tell me the {kind} after {s}?",
        ),
        ("The {kind} after {s} is {x}.", "The {kind} right after {s} is {x}.", "After {s} comes {x}."),
        mention,
        restatement,
    )


def _examples() -> Family:
    categories = tables.CATEGORIES
    mention = words_pattern(item for items in categories.values() for item in items)
    category = words_pattern(categories)

    def restatement(prompt: str) -> re.Pattern[str]:
        asked = _found(category, prompt)
        return words_pattern(asked) if asked else _NOTHING

    facts = tuple(
        Fact(
            {"kind": kind},
            items,
            tuple(item for other in categories if other != kind for item in categories[other]),
        )
        for kind, items in categories.items()
    )
    return Family(
        "example",
        facts,
        (
            "Name one {kind}.",
            "Can you name {kind_a}?",
            "Give me an example of {kind_a}.",
            "I need {kind_a}. Which one do I take?",
            "Which {kind} do you know?",
            "Think of {kind_a}. Which one is it?",
        ),
        ("One {kind} is {x}.", "An example of {kind_a} is {x}.", "{kind_a} that I know is {x}."),
        mention,
        restatement,
    )


def _spelling() -> Family:
    words = tables.SPELLING_WORDS

    def spelled(word: str) -> str:
        return "-".join(word)

    def slips(word: str) -> tuple[str, ...]:
        return (
            spelled(word[:-1]),
            spelled(word[0] + word[2:]),
            spelled(word[1] + word[0] + word[2:]),
            spelled(word + "e"),
        )

    mention = re.compile(rf"\b[a-z](?:-[a-z])+\b|{words_pattern(words).pattern}", re.IGNORECASE)

    def restatement(prompt: str) -> re.Pattern[str]:
        asked = _found(mention, prompt)
        return re.compile(rf"(?<![\w-]){asked[0]}(?![\w-])", re.IGNORECASE) if asked else _NOTHING

    return Family(
        "spelling",
        tuple(Fact({"s": word}, (spelled(word),), slips(word)) for word in words),
        (
            "How do you spell {s}?",
            "Spell the word {s}.",
            "Can you spell {s} for me?",
            "What is the spelling of {s}?",
            "How is {s} written?",
        ),
        ("The word {s} is spelled {x}.", "You spell {s} like this: {x}.", "{s} is written {x}."),
        mention,
        restatement,
    )


@cache
def families() -> dict[str, Family]:
    """All families by name, in a fixed order."""
    made = (
        _sums(),
        _differences(),
        _comparisons(),
        _table(
            "opposite",
            tables.OPPOSITES,
            (
                "What is the opposite of {s}?",
                "Which word is the opposite of {s}?",
                "Give me the opposite of {s}.",
                "What word means the reverse of {s}?",
            ),
            ("The opposite of {s} is {x}.", "Opposite to {s} is {x}.", "The reverse of {s} is {x}."),
        ),
        _table(
            "capital",
            tables.CAPITALS,
            (
                "What is the capital of {s}?",
                "Which city is the capital of {s}?",
                "Name the capital of {s}.",
                "Can you tell me the capital of {s}?",
                "What city does {s} have as its capital?",
            ),
            ("The capital of {s} is {x}.", "In {s}, the capital is {x}.", "The capital city of {s} is {x}."),
        ),
        _table(
            "plural",
            tables.PLURALS,
            (
                "What is the plural of {s}?",
                "Which word is the plural of {s}?",
                "Give me the plural of {s}.",
                "What do you call more than one {s}?",
            ),
            (
                "The plural of {s} is {x}.",
                "The plural form of {s} is {x}.",
                "More than one {s} are called {x}.",
            ),
        ),
        _table(
            "colour",
            tables.COLOURS,
            (
                "What colour is {s}?",
                "Which colour does {s} have?",
                "Tell me the colour of {s}.",
                "Do you know what colour {s} is?",
            ),
            ("The colour of {s} is {x}.", "{s} is {x}.", "The usual colour of {s} is {x}."),
        ),
        _table(
            "young",
            tables.YOUNG_ANIMALS,
            (
                "What is a young {s} called?",
                "How do you call a baby {s}?",
                "What is the name for a young {s}?",
                "Give me the word for a baby {s}.",
                "A {s} has a little one. What is it called?",
            ),
            ("A young {s} is called a {x}.", "A baby {s} is a {x}.", "The word for a young {s} is {x}."),
        ),
        _spelling(),
        _sequences(),
        _examples(),
    )
    return {family.name: family for family in made}
