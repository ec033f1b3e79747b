"""The summary of judgements, printed: each figure with its unit, and what may be read from them."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tieback.pipeline.labelling.quality import MIN_KNOWN_PAIRS
from tieback.pipeline.labelling.strengths import Strength

# Fewer pairs of responses that several people judged know the agreement to no better than ±0.25: in a simulation (two annotators,
# alpha 0.47, 300 draws) 1.96 standard deviations of alpha were 0.54 at 10 such pairs, 0.23 at 50, 0.17 at 120.
MIN_SHARED_PAIRS = 50
# Krippendorff (2004, "Content Analysis"): conclusions are tentative from the first on, reliable from the second.
_TENTATIVE, _RELIABLE = 0.667, 0.8
_TRUSTED = 0.7
# Nobody reads two responses in less.
_HASTY_SECONDS = 2.0

_UNITS = {
    "judgements": "judgements, flags included",
    "judgements/of_other_files": "judgements of responses that are not in this file",
    "items/judged": "items",
    "items/left": "items that nobody has judged",
    "items/by_several": "items that two people or more judged",
    "judgements/by/": "judgements",
    "flagged/": "judgements",
    "hasty/": "judgements, faster than anyone reads (--leave_out_hasty)",
    "adjudicated": "items that were settled by another annotator",
    "items/disputed": "items whose responses two people order differently, not settled (--adjudicate)",
    "gold/accuracy/": "of the pairs with a known order: ordered so",
    "gold/pairs/": "pairs with a known order that they judged",
    "seconds/median": "seconds from an item's showing to its judgement",
    "ties/share": "of the pairs of responses",
    "ratings/": "mean, 1 to 5",
    "agreement/shared_pairs": "pairs of responses that two people or more judged",
    "agreement/pairwise": "of the shared pairs: two people order them alike, ties left out",
    "agreement/alpha": "Krippendorff's alpha: 1 perfect, 0 chance",
    "bias/first_shown": "of the untied pairs: the response shown first won (95% interval)",
    "bias/longer": "of the untied pairs: the longer response won (95% interval)",
}


def print_summary(
    figures: dict[str, float],
    matrix: Mapping[tuple[str, str], tuple[float, int]] | None = None,
    compared: Sequence[Strength] = (),
) -> None:
    """Print the figures (see `judgement_figures`) as a table, what they say below it, how far each two annotators agree, and how strong
    each of several policies is."""
    table = Table("figure")
    table.add_column("value", justify="right")
    table.add_column("of what")
    for name, value in figures.items():
        if "/ci95_" in name:
            continue
        text = f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
        if f"{name}/ci95_low" in figures:
            text += f" ({figures[f'{name}/ci95_low']:.2g} to {figures[f'{name}/ci95_high']:.2g})"
        table.add_row(Text(name), text, _unit(name))
    console = Console()
    console.print(table)
    for sentence in readings(figures):
        console.print(sentence, markup=False, highlight=False)
    if matrix:
        console.print(_matrix_table(matrix))
    if compared:
        console.print(_strengths_table(compared))


def _strengths_table(compared: Sequence[Strength]) -> Table:
    caption = (
        "Bradley–Terry: a difference of 1 is odds of 2.7 to 1. Intervals that overlap leave the order open."
    )
    table = Table("policy", "strength (95% interval)", "won", "comparisons", caption=caption)
    for each in compared:
        interval = f"{each.strength:+.2f} ({each.low:+.2f} to {each.high:+.2f})"
        table.add_row(Text(each.policy), interval, f"{each.won:.0%}", f"{each.comparisons:,}")
    return table


def _matrix_table(matrix: Mapping[tuple[str, str], tuple[float, int]]) -> Table:
    names = sorted({name for names in matrix for name in names})
    columns = ["agreement", *map(escape, names)]
    table = Table(*columns, caption="share of the pairs ordered alike (pairs)")
    for one in names:
        cells = [matrix.get((min(one, other), max(one, other))) for other in names]
        table.add_row(Text(one), *("" if cell is None else f"{cell[0]:.2f} ({cell[1]:,})" for cell in cells))
    return table


def readings(figures: dict[str, float]) -> list[str]:
    """What the figures say, in sentences."""
    sentences = [_agreement(figures)] if figures["judgements"] else ["Nothing is judged yet."]
    for name, who in (("first_shown", "the response shown first"), ("longer", "the longer response")):
        low, high = (figures.get(f"bias/{name}/ci95_{end}") for end in ("low", "high"))
        if low is not None and high is not None and not low <= 0.5 <= high:
            verb = "wins" if low > 0.5 else "loses"
            sentences.append(f"Bias: {who} {verb} more often than not ({figures[f'bias/{name}']:.0%} won).")
    for name, value in figures.items():
        annotator = name.removeprefix("gold/accuracy/")
        pairs = figures.get(f"gold/pairs/{annotator}", 0)
        if annotator != name and pairs >= MIN_KNOWN_PAIRS and value < _TRUSTED:
            sentences.append(
                f"{annotator} orders {value:.0%} of the {pairs:,.0f} pairs with a known order as known: below {_TRUSTED:.0%}, look at "
                "their judgements, or at the guidelines (--leave_out_below)."
            )
    if figures.get("seconds/median", _HASTY_SECONDS) < _HASTY_SECONDS:
        sentences.append(
            f"Half of the judgements took less than {figures['seconds/median']:.1f} seconds: nobody reads so fast."
        )
    return sentences


def _agreement(figures: dict[str, float]) -> str:
    shared = figures.get("agreement/shared_pairs", 0)
    if not shared:
        return "Agreement: unknown, since no item was ranked by two people (see --overlap)."
    if shared < MIN_SHARED_PAIRS:
        return (
            f"Agreement: not to be told from {shared:,} shared pairs of responses; from {MIN_SHARED_PAIRS} on alpha is "
            "known to about 0.25 (see --overlap)."
        )
    alpha = figures.get("agreement/alpha")
    if alpha is None:
        return "Agreement: not to be told, since every verdict on the shared pairs is a tie."
    if alpha >= _RELIABLE:
        verdict = "reliable"
    elif alpha >= _TENTATIVE:
        verdict = "good enough for tentative conclusions"
    else:
        verdict = "low: people often disagree, so a reward model has much noise to learn from"
    return (
        f"Agreement: alpha {alpha:.2f} is {verdict} (Krippendorff: tentative from 0.67, reliable from 0.80)."
    )


def _unit(name: str) -> str:
    return _UNITS.get(name) or next(
        unit for prefix, unit in _UNITS.items() if prefix.endswith("/") and name.startswith(prefix)
    )
