"""Examples side by side: which pairs of an evaluation the page shows, and their HTML."""

import html
import random
import re
from collections.abc import Sequence
from typing import Any

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def escape(text: Any) -> str:
    """Return `text` as HTML that shows it and does nothing else.

    Prompts and responses are data: markup in them is shown as it was written, control characters are shown as their
    Unicode pictures, and halves of surrogate pairs, which UTF-8 cannot hold, as question marks.
    """
    visible = _CONTROL.sub(lambda found: chr(0x2400 + min(ord(found.group()), 0x21)), str(text))
    return html.escape(visible.encode("utf-8", "replace").decode("utf-8"), quote=True)


def drawn_at_random(pairs: Sequence[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """`count` different pairs drawn uniformly, in their original order: the page must not choose its best ones."""
    chosen = random.Random(seed).sample(range(len(pairs)), min(count, len(pairs)))
    return [pairs[i] for i in sorted(chosen)]


def worst_for_ppo(pairs: Sequence[dict[str, Any]], judge: str, count: int) -> list[dict[str, Any]]:
    """The pairs that PPO lost by most on the score named `judge`, worst first; fewer where it lost fewer."""
    lost = [pair for pair in pairs if pair["ppo"][judge] < pair["sft"][judge]]
    return sorted(lost, key=lambda pair: pair["ppo"][judge] - pair["sft"][judge])[:count]


def pair_html(pair: dict[str, Any], judge: str) -> str:
    """One prompt with the two responses to it, their scores, and which one the score named `judge` prefers."""
    sides = "".join(_side_html(pair, system, judge) for system in ("sft", "ppo"))
    return f'<article class="pair"><div class="prompt">{_prompt_html(pair["prompt"])}</div><div class="sides">{sides}</div></article>'


def _prompt_html(prompt: str | list[dict[str, Any]]) -> str:
    if isinstance(prompt, str):
        return _text_html(prompt)
    if len(prompt) == 1:
        return _text_html(prompt[0]["content"])
    return "".join(
        f'<div class="role">{escape(message["role"])}</div>{_text_html(message["content"])}'
        for message in prompt
    )


def _text_html(text: str) -> str:
    if not text.strip():
        return '<div class="text empty">(empty)</div>'
    return f'<div class="text" dir="auto">{escape(text)}</div>'


def _side_html(pair: dict[str, Any], system: str, judge: str) -> str:
    side, other = pair[system], pair["ppo" if system == "sft" else "sft"]
    won = ' <span class="won">preferred</span>' if side[judge] > other[judge] else ""
    facts = [
        f"{label} {number(side[name], 2)}"
        for name, label in (("gold_score", "gold"), ("reward_score", "reward model"))
        if name in side
    ]
    facts.append(f"{side['num_tokens']} tokens" + (", cut off" if side["truncated"] else ""))
    return (
        f'<div class="side"><h4><span class="{system}">{system.upper()}</span>{won}</h4>{_text_html(side["response"])}'
        f'<div class="meta">{" · ".join(facts)}</div></div>'
    )


def number(value: float, decimals: int, signed: bool = False) -> str:
    """Write `value` with a true minus sign, and a plus sign where `signed`."""
    return f"{value:{'+' if signed else ''}.{decimals}f}".replace("-", "−")
