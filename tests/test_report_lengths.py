"""The report's histograms of lengths and its table of what the stages took."""

import pytest

from tieback.pipeline.report.costs import costs_html
from tieback.pipeline.report.lengths import bin_width, histogram, lengths_html


def test_a_histogram_counts_every_response_once() -> None:
    values = [0, 1, 4.0, 5, 9, 10, 14]
    drawn = histogram("PPO", values, 5)
    # Two corners a bin, and down to 0 behind the last.
    assert drawn.steps == (0, 5, 5, 10, 10, 15, 15)
    shares = drawn.values[:-1:2]
    assert shares == pytest.approx([300 / 7, 200 / 7, 200 / 7])
    assert sum(shares) == pytest.approx(100)
    assert drawn.values[-1] == 0


@pytest.mark.parametrize(
    ("longest", "width"), [(1, 1), (23, 1), (24, 2), (47, 2), (48, 5), (120, 10), (239, 10), (4000, 200)]
)
def test_bins_are_round_numbers_and_at_most_24(longest: int, width: int) -> None:
    assert bin_width(longest) == width
    assert longest // width + 1 <= 24


def test_the_chart_has_both_policies_and_a_text() -> None:
    pairs = [{"ppo": {"num_tokens": 3 + row}, "sft": {"num_tokens": 9}} for row in range(4)]
    html = lengths_html(pairs)
    assert "PPO: 0 at tokens 0, 0 at 7; between 0 and 25." in html
    assert "SFT: 0 at tokens 0, 0 at 10; between 0 and 100." in html
    assert 'role="img"' in html
    assert lengths_html([]) == ""


def test_what_stages_took_stands_in_one_row_each() -> None:
    html = costs_html(
        {
            "sft": {"train/seconds": 283.7, "train/seconds_to_first_step": 16.3, "memory/peak": 1500.4},
            "ppo": {"train/seconds": 1221.0, "tokens_per_second": 2345.6},
            "old": {"loss/train": 0.5},
        }
    )
    assert "<tr><td>sft</td><td>284 s</td><td>16 s</td><td></td><td>1,500 MiB</td></tr>" in html
    assert "<tr><td>ppo</td><td>1,221 s</td><td></td><td>2,346</td><td></td></tr>" in html
    assert "old" not in html
    assert costs_html({"old": {"loss/train": 0.5}}) == ""
