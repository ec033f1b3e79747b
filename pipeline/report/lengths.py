"""How long the responses are, as histograms of SFT and PPO on common axes."""

import itertools
from collections.abc import Sequence

from tieback.pipeline.report.curves import Curve, line_chart
from tieback.pipeline.report.pairs import Pair, column

_MOST_BINS = 24


def lengths_html(pairs: Sequence[Pair]) -> str:
    """A chart of the shares of responses by length in tokens, PPO's drawn through and SFT's dashed; empty without pairs."""
    if not pairs:
        return ""
    lengths = {system: column(pairs, system, "num_tokens") for system in ("ppo", "sft")}
    width = bin_width(max(max(values) for values in lengths.values()))
    chart = line_chart(
        [histogram(name, lengths[system], width) for system, name in (("ppo", "PPO"), ("sft", "SFT"))],
        "Lengths of the responses",
        "tokens",
        "% of the responses",
    )
    note = f'bins of {width} tokens <span class="ppo">— PPO</span> <span class="sft">- - SFT</span>'
    return (
        '<h2>Lengths</h2><p class="note">A policy that has found that length pays writes longer responses, or ends them all at one length.</p>'
        f'<div class="charts"><figure><figcaption><b>Lengths of the responses</b> {note}</figcaption>{chart}</figure></div>'
    )


def bin_width(longest: float) -> int:
    """The least of 1, 2, 5, 10, 20, 50, … with which so many tokens take at most 24 bins."""
    widths = (step * 10**exponent for exponent in itertools.count() for step in (1, 2, 5))
    return next(width for width in widths if longest // width < _MOST_BINS)


def histogram(name: str, values: Sequence[float], width: int) -> Curve:
    """Share in per cent of the values in each bin [k·width, (k + 1)·width), as a line of steps from 0 up to the last bin's end."""
    counts = [0] * (int(max(values) // width) + 1)
    for value in values:
        counts[int(value // width)] += 1
    corners = [
        (place + end, 100 * count / len(values)) for place, count in enumerate(counts) for end in (0, 1)
    ]
    steps = [place * width for place, _ in corners]
    return Curve(name, (*steps, steps[-1]), (*(share for _, share in corners), 0.0))
