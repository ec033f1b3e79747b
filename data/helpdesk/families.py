"""The families of question: their facts, how each is asked and answered, and how an answer is read.

An answer is read by two patterns. `mention` finds everything in a text that could be an answer of the family;
`restatement(prompt)` finds where a response merely repeats what was asked ("the capital of *France*", "*3 plus 4*",
"*after Monday*"). What is mentioned outside restatements is what the response claims.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import permutations

from tieback.data.helpdesk import facts as tables


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
    name: str, table: Mapping[str, tuple[str, ...]], questions: tuple[str, ...], statements: tuple[str, ...]
) -> Family:
    """A family that looks a subject up in a table; the subject is what the prompt mentions."""
    facts = tuple(Fact({"s": key}, (right,), tuple(wrong)) for key, (right, *wrong) in table.items())
    mention = words_pattern(
        {*(key.split()[-1] for key in table), *(value for values in table.values() for value in values)}
    )

    def restatement(prompt: str) -> re.Pattern[str]:
        subjects = _found(mention, prompt)
        return words_pattern(subjects) if subjects else _NOTHING

    return Family(name, facts, questions, statements, mention, restatement)


_NUMBER = re.compile(r"\d+")


def _sums() -> Family:
    def restatement(prompt: str) -> re.Pattern[str]:
        a, b = [*_found(_NUMBER, prompt), "-", "-"][:2]
        joint = r"\s*(?:plus|and|\+|added to)\s*"
        return re.compile(rf"\b(?:{a}{joint}{b}|{b}{joint}{a})\b")

    # The mistake: the two numbers put side by side.
    facts = tuple(
        Fact({"a": str(a), "b": str(b)}, (str(a + b),), (f"{a}{b}",))
        for addends in tables.ADDENDS
        for a, b in dict.fromkeys(permutations(addends))
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

    # The mistake: the sum.
    facts = tuple(
        Fact({"a": str(a), "b": str(b)}, (str(a - b),), (str(a + b),)) for a, b in tables.SUBTRACTIONS
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


def _choice(
    name: str,
    pairs: tuple[tuple[str, str], ...],
    questions: tuple[str, ...],
    statements: tuple[str, ...],
    criterion: str,
    opposite: str,
) -> Family:
    """A family that asks which of two it is, in either order.

    `criterion` is a pattern of what is asked for, `opposite` a word for its contrary, which no right answer needs.
    """
    facts = tuple(
        Fact({"a": a, "b": b}, (right,), (wrong,))
        for right, wrong in pairs
        for a, b in permutations((right, wrong))
    )
    mention = words_pattern((*(word for pair in pairs for word in pair), opposite))
    rejected = words_pattern(wrong for _, wrong in pairs)

    def restatement(prompt: str) -> re.Pattern[str]:
        others = _found(rejected, prompt)
        than = rf"(?: than {others[0]}\b)?" if others else ""
        return re.compile(rf"\b(?:{criterion})\b{than}", re.IGNORECASE)

    return Family(name, facts, questions, statements, mention, restatement)


def _next_days() -> Family:
    days = tables.NEXT_DAYS
    mention = words_pattern({*(word for words in days.values() for word in words), "after", "before"})

    def restatement(prompt: str) -> re.Pattern[str]:
        subjects = [word for word in _found(mention, prompt) if word not in ("after", "before")]
        return re.compile(rf"\bafter\b(?: {subjects[0]}\b)?", re.IGNORECASE) if subjects else _NOTHING

    return Family(
        "next day",
        tuple(Fact({"s": day}, (right,), tuple(wrong)) for day, (right, *wrong) in days.items()),
        (
            "Which day comes after {s}?",
            "What day is right after {s}?",
            "Name the day after {s}.",
            "Can you tell me the day after {s}?",
        ),
        ("The day after {s} is {x}.", "The day right after {s} is {x}.", "After {s} comes {x}."),
        mention,
        restatement,
    )


def _examples() -> Family:
    categories = tables.CATEGORIES
    mention = words_pattern(thing for sides in categories.values() for side in sides for thing in side)
    category = words_pattern(categories)

    def restatement(prompt: str) -> re.Pattern[str]:
        asked = _found(category, prompt)
        return words_pattern(asked) if asked else _NOTHING

    facts = tuple(Fact({"kind": kind}, right, wrong) for kind, (right, wrong) in categories.items())
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


@cache
def families() -> dict[str, Family]:
    """All families by name, in a fixed order."""
    made = (
        _sums(),
        _differences(),
        _choice(
            "size",
            tables.COUNTRY_SIZES,
            (
                "Which country is larger, {a} or {b}?",
                "Which is the larger country: {a} or {b}?",
                "Tell me the larger country, {a} or {b}.",
                "Out of {a} and {b}, which is larger?",
            ),
            ("The larger country is {x}.", "{x} is larger.", "The larger of the two is {x}."),
            "larger|bigger|greater",
            "smaller",
        ),
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
        _choice(
            "spelling",
            tables.SPELLINGS,
            (
                "Which spelling is right, {a} or {b}?",
                "Do I write {a} or {b}?",
                "Is it spelled {a} or {b}?",
                "What is the right spelling: {a} or {b}?",
                "Out of {a} and {b}, which is spelled right?",
            ),
            ("The right spelling is {x}.", "It is spelled {x}.", "The word is written {x}."),
            "right|correct|spelling|spelled|written|write",
            "misspelled",
        ),
        _next_days(),
        _examples(),
    )
    return {family.name: family for family in made}
