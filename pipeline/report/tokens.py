"""Completions token by token, coloured by what PPO made of each."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tieback.data.conversations import as_messages
from tieback.pipeline.report.html_parts import escape, number

# Name of a figure of a token, what it is, and whether its sign matters.
FIGURES = (
    ("reward", "Reward", "−kl_coef·KL, and what is paid at the token", True),
    ("value", "Value", "what the critic expected before the token", True),
    ("advantage", "Advantage", "how much better than expected; before whitening", True),
    ("kl", "KL", "log π − log π of the reference, in nats", True),
    ("logprob", "Log-probability", "by the policy, in nats", False),
    ("ratio", "π / μ", "by scoring over by the sampler, less 1", True),
)


def completion_html(
    row: Mapping[str, Any], figures: Mapping[str, Sequence[float]], title: str, scales: Mapping[str, float]
) -> str:
    """One completion: the prompt, what judged it, and its tokens once for each figure.

    Args:
        row: `prompt`, `tokens` and `facts`, a sentence.
        figures: for each name of `FIGURES` that there is, a number a token.
        title: heading.
        scales: the number of each figure that has the full colour.
    """
    prompt = "".join(
        f"<p><b>{escape(message['role'])}</b> <span class='text'>{escape(message['content'])}</span></p>"
        for message in as_messages(row["prompt"])
    )
    lines = "".join(
        f"<tr><th scope='row'>{label}<small>{note}</small></th><td>{_tokens(row['tokens'], figures[name], scales[name], signed)}</td></tr>"
        for name, label, note, signed in FIGURES
        if name in figures
    )
    return (
        f"<section class='pair'><div class='prompt'><h3>{escape(title)}</h3>{prompt}<p class='note'>{escape(row['facts'])}</p></div>"
        f"<div class='scroll'><table class='tokens'>{lines}</table></div></section>"
    )


def scale_of(values: Sequence[float]) -> float:
    """The size that 95% of the finite numbers stay below: it has the full colour."""
    sizes = sorted(abs(value) for value in values if math.isfinite(value))
    return (sizes[int(0.95 * (len(sizes) - 1))] if sizes else 1.0) or 1.0


def _tokens(tokens: Sequence[str], values: Sequence[float], scale: float, signed: bool) -> str:
    """The tokens in a row, each with its number below the pointer and as a colour: blue above 0, orange below."""
    return "".join(
        f"<span class='token' title='{_title(value)}' style='background:{_colour(value / scale, signed)}'>{_shown(token)}</span>"
        for token, value in zip(tokens, values, strict=True)
    )


def _title(value: float) -> str:
    return "not written by the policy" if math.isnan(value) else number(value, 4)


def _shown(token: str) -> str:
    return escape(token.replace("\n", "↵") or "∅")


def _colour(share: float, signed: bool) -> str:
    if not math.isfinite(share):
        return "var(--line)"
    hue = "--sft" if share < 0 or not signed else "--ppo"
    return f"color-mix(in srgb, var({hue}) {round(70 * min(abs(share), 1))}%, transparent)"
