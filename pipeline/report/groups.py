"""How PPO does at each kind of prompt, by the columns of the data that name kinds."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from tieback.pipeline.report.html_parts import escape, number
from tieback.pipeline.report.pairs import SYSTEMS, Pair
from tieback.pipeline.sample_statistics import bootstrap_interval

_MOST_GROUPS = 20
_LEAST_PROMPTS = 5  # of a group, in the mean
_RESAMPLES = 2000


def groups_html(pairs: Sequence[Pair], judge: str, seed: int) -> str:
    """A table for each column whose values are kinds: few, and with several prompts each. The worst kind comes first.

    Args:
        pairs: the rows of samples.jsonl.
        judge: `gold_score` or `reward_score`.
        seed: of the intervals.
    """
    tables = "".join(_table(pairs, name, judge, seed) for name in kinds(pairs))
    if not tables:
        return ""
    return (
        '<h2>By kind of prompt</h2><p class="note">The kind where PPO wins least comes first. Few prompts make a wide interval: where '
        f"two of them overlap, the order of the kinds is chance.</p>{tables}"
    )


def kinds(pairs: Sequence[Pair]) -> list[str]:
    """Names of the columns whose values are kinds of prompts."""
    found = []
    for name in pairs[0].get("columns", {}) if pairs else ():
        values = [pair["columns"].get(name) for pair in pairs]
        if not all(isinstance(value, str | bool | int) for value in values):
            continue
        count = len(set(values))
        if 2 <= count <= _MOST_GROUPS and len(pairs) >= _LEAST_PROMPTS * count:
            found.append(name)
    return found


def _table(pairs: Sequence[Pair], name: str, judge: str, seed: int) -> str:
    groups: dict[Any, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(pair["columns"][name], []).append(pair)
    ordered = sorted(groups.items(), key=lambda item: fmean(pair["outcome"] for pair in item[1]))
    rows = "".join(_row(kind, of, judge, seed) for kind, of in ordered)
    score = "gold" if judge == "gold_score" else "reward model"
    head = "".join(
        f'<th scope="col">{label}</th>'
        for label in (
            "prompts",
            "PPO wins",
            "95% interval",
            f"SFT, {score}",
            f"PPO, {score}",
            "SFT, tokens",
            "PPO, tokens",
        )
    )
    return (
        f'<div class="scroll"><table><thead><tr><th scope="col">{escape(name)}</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _row(kind: Any, pairs: Sequence[Pair], judge: str, seed: int) -> str:
    outcomes = [pair["outcome"] for pair in pairs]
    low, high = bootstrap_interval(outcomes, resamples=_RESAMPLES, seed=seed)
    cells = [
        str(len(pairs)),
        f"{100 * fmean(outcomes):.0f}%",
        f"{100 * low:.0f}% to {100 * high:.0f}%",
        *(number(fmean(pair[system][judge] for pair in pairs), 2) for system in SYSTEMS),
        *(number(fmean(pair[system]["num_tokens"] for pair in pairs), 1) for system in SYSTEMS),
    ]
    return f"<tr><td>{escape(kind)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
