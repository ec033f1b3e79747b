"""Sentiment by rule: VADER's compound score (Hutto and Gilbert 2014)."""

from functools import cache
from typing import Any

from tieback.cli.errors import UsageError
from tieback.data.conversations import TextOrMessages


def compound(completions: list[TextOrMessages], **columns: Any) -> list[float]:
    """Sentiment of each completion, from −1 (very negative) to 1 (very positive).

    Args:
        completions: texts, or lists of messages.
        columns: not used.

    Raises:
        UsageError: VADER is not installed.
    """
    analyzer = _analyzer()
    return [analyzer.polarity_scores(_text(completion))["compound"] for completion in completions]


@cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise UsageError(
            "VADER is not installed. Install the extra `pretrained` (pip install 'tieback[pretrained]')."
        ) from error
    return SentimentIntensityAnalyzer()


def _text(completion: TextOrMessages) -> str:
    if isinstance(completion, str):
        return completion
    return " ".join(message["content"] for message in completion)
