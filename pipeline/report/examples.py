"""Examples side by side: the pairs of an evaluation that the page shows, as HTML."""

import difflib
import random
import re
from collections.abc import Sequence
from typing import Any

from tieback.pipeline.report.html_parts import escape, number

# Words compared for marks (the time grows with their square), and how alike two responses must be to be marked.
_MOST_WORDS, _LEAST_IN_COMMON = 600, 0.4


def examples_html(pairs: Sequence[dict[str, Any]], judge: str, count: int, seed: int) -> str:
    """The section of examples: `count` drawn at random, and all others for whom the page's script can sort.

    Args:
        pairs: rows of samples.jsonl.
        judge: name of the score that decides.
        count: pairs shown at first.
        seed: of the draw.
    """
    drawn = set(random.Random(seed).sample(range(len(pairs)), min(count, len(pairs))))
    articles = "".join(_pair_html(pair, judge, number in drawn) for number, pair in enumerate(pairs))
    orders = (("random", "drawn at random"), ("gain", "PPO won by most"), ("loss", "PPO lost by most"))
    buttons = "".join(
        f'<button type="button" data-order="{order}" aria-pressed="{str(order == "random").lower()}">{label}</button>'
        for order, label in (*orders, ("ppo", "PPO’s best"), ("length", "PPO’s longest"))
    )
    return (
        f'<h2>Responses side by side</h2><p class="note">{len(drawn)} of {len(pairs)} prompts, at first drawn at random. '
        "<mark>Marked</mark> words stand on one side only; <code>samples.jsonl</code> has all the figures.</p>"
        f'<div class="orders" hidden>{buttons}</div><div id="pairs" data-count="{max(count, 1)}">{articles}</div>'
    )


def _pair_html(pair: dict[str, Any], judge: str, is_drawn: bool) -> str:
    """One prompt with the two responses to it, their scores, and which one the score named `judge` prefers."""
    sides = "".join(_side_html(pair, system, judge) for system in ("sft", "ppo"))
    gain = pair["ppo"][judge] - pair["sft"][judge]
    keys = f'data-gain="{gain:.6g}" data-ppo="{pair["ppo"][judge]:.6g}" data-length="{pair["ppo"]["num_tokens"]}"'
    return (
        f'<article class="pair" {keys} data-drawn="{int(is_drawn)}"{"" if is_drawn else " hidden"}>'
        f'<div class="prompt">{_prompt_html(pair["prompt"])}</div><div class="sides">{sides}</div></article>'
    )


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
        f'<div class="side"><h4><span class="{system}">{system.upper()}</span>{won}</h4>'
        f'{_changed_html(side["response"], other["response"])}<div class="meta">{" · ".join(facts)}</div></div>'
    )


def _changed_html(text: str, other: str) -> str:
    """`text` with the words marked that `other` does not have in their place, where the two have much in common."""
    words, others = (re.findall(r"\s*\S+", response) for response in (text, other))
    compared, against = ([word.strip() for word in part[:_MOST_WORDS]] for part in (words, others))
    # Without autojunk, whose shortcut for long texts takes frequent words for noise.
    matcher = difflib.SequenceMatcher(None, against, compared, autojunk=False)
    if not words or matcher.ratio() < _LEAST_IN_COMMON:
        return _text_html(text)
    parts = []
    for kind, _, _, start, end in matcher.get_opcodes():
        piece = "".join(words[start:end])
        marked = piece.lstrip() if kind != "equal" else ""
        space = piece.removesuffix(marked) if marked else piece
        parts.append(escape(space) + (f"<mark>{escape(marked)}</mark>" if marked else ""))
    parts.append(escape("".join(words[_MOST_WORDS:])))
    return f'<div class="text" dir="auto">{"".join(parts)}</div>'
