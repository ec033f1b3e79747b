"""The report's figures against closed forms."""

import math

import matplotlib.image
import numpy as np
import pytest

from tieback.reward_model.report import (
    calibration_bins,
    expected_calibration_error,
    margin_by_annotator,
    pair_accuracy,
    read_calibration,
    write_calibration,
)


def test_accuracy_counts_a_tie_as_half():
    assert pair_accuracy([2.0, -1.0, 0.0, 0.5]) == pytest.approx(2.5 / 4)


@pytest.mark.parametrize(
    ("margins", "error"),
    [
        ([0.0] * 7, 0.0),  # says ½, and in both orders it is ½
        ([50.0] * 7, 0.0),  # sure, and right
        ([-50.0] * 7, 1.0),  # sure, and wrong
        ([math.log(3)] * 3 + [-math.log(3)], 0.0),  # says ¾, right in ¾
        ([math.log(3)] * 4, 0.25),  # says ¾, always right
        ([math.log(3)] * 4 + [0.0] * 4, 0.125),  # half of the pairs off by ¼
    ],
)
def test_ece_closed_forms(margins, error):
    assert expected_calibration_error(margins) == pytest.approx(error, abs=1e-12)


def test_ece_against_a_loop():
    rng = np.random.default_rng(0)
    margins = rng.normal(0.7, 1.5, size=500)
    cases = [(1 / (1 + math.exp(-m)), 1) for m in margins] + [(1 / (1 + math.exp(m)), 0) for m in margins]
    error = 0.0
    for b in range(10):
        inside = [(p, y) for p, y in cases if b / 10 <= p < (b + 1) / 10 or (b == 9 and p == 1)]
        if inside:
            error += abs(sum(p for p, _ in inside) - sum(y for _, y in inside)) / len(cases)
    assert expected_calibration_error(margins) == pytest.approx(error, abs=1e-9)


def test_bins_mirror_each_other_as_each_pair_counts_in_both_orders():
    margins = np.random.default_rng(1).normal(size=200)
    bins = calibration_bins(margins)
    assert sum(part.count for part in bins) == 400
    for low, high in zip(bins, reversed(bins), strict=True):
        assert low.count == high.count
        assert low.predicted == pytest.approx(1 - high.predicted)
        assert low.observed == pytest.approx(1 - high.observed)


def test_a_calibrated_model_has_a_small_ece_and_an_overconfident_one_has_not():
    rng = np.random.default_rng(2)
    strength = rng.normal(0, 1.5, size=20_000)
    first_preferred = rng.random(len(strength)) < 1 / (1 + np.exp(-strength))
    margins = np.where(first_preferred, strength, -strength)
    assert expected_calibration_error(margins) < 0.01
    assert expected_calibration_error(3 * margins) > 0.1


def test_margin_by_annotator():
    margins = margin_by_annotator([1.0, 2.0, -3.0, 5.0], ["zoe", "al", "zoe", "al"])
    assert margins == {"al": 3.5, "zoe": -1.0}
    assert list(margins) == ["al", "zoe"]


def test_calibration_is_written_as_figures_and_as_an_image(tmp_path):
    assert read_calibration(tmp_path) == []
    write_calibration([0.5, -0.2, 1.5], tmp_path)
    assert read_calibration(tmp_path) == calibration_bins([0.5, -0.2, 1.5])
    image = matplotlib.image.imread(tmp_path / "calibration.png")
    assert min(image.shape[:2]) > 300
    assert image.std() > 0.01
