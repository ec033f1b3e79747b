"""Grade-school mathematics: whether the final answer is right (Cobbe et al. 2021, "Training Verifiers to Solve Math Word
Problems")."""

import re
from typing import Any

from tieback.cli.errors import UsageError
from tieback.data.conversations import TextOrMessages, last_text

# What stands after ####, as in the data set's own answers.
_FINAL = re.compile(r"####\s*\$?\s*(-?[\d,]*\.?\d+)")


def exact(completions: list[TextOrMessages], answer: list[str], **columns: Any) -> list[float]:
    """1 for each completion whose last `#### <number>` is that of the row's `answer`, else 0.

    Args:
        completions: texts, or lists of messages.
        answer: solutions that end in `#### <number>`, or the numbers alone.
        columns: not used.

    Raises:
        UsageError: an answer names no number.
    """
    return [
        float(final_number(last_text(completion)) == _wanted(text))
        for completion, text in zip(completions, answer, strict=True)
    ]


def final_number(text: str) -> float | None:
    """The number behind the last `####`; None where there is none."""
    found = _FINAL.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _wanted(answer: str) -> float:
    number = final_number(answer if "####" in answer else f"#### {answer}")
    if number is None:
        raise UsageError(
            f"gsm8k:exact needs a column `answer` that ends in `#### <number>` or is a number, but a row has {answer[:80]!r}."
        )
    return number
