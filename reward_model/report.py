"""Quality of a reward model: accuracy against a trivial rule, calibration, and the margin by annotator.

Everything here works on margins, score(chosen) − score(rejected), one a pair. Under Bradley–Terry the model says that
the chosen response is preferred with probability σ(margin).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

_CALIBRATION = "calibration.json"


@dataclass(frozen=True)
class CalibrationBin:
    """Pairs whose predicted probability falls into one bin.

    Args:
        predicted: their mean predicted probability that the first response is preferred.
        observed: the share of them where it was.
        count: how many they are.
    """

    predicted: float
    observed: float
    count: int


def pair_accuracy(differences: Sequence[float]) -> float:
    """Share of pairs where chosen exceeds rejected; a tie counts ½, as a coin's toss would on average.

    Args:
        differences: chosen − rejected, of scores or (for the rule "always the longer") of lengths.
    """
    values = np.asarray(differences, dtype=float)
    return float(np.mean((values > 0) + 0.5 * (values == 0)))


def calibration_bins(margins: Sequence[float], num_bins: int = 10) -> list[CalibrationBin]:
    """Reliability diagram of σ(margin) over equal bins of [0, 1]; empty bins are left out.

    Each pair counts in both orders, with p = σ(margin) (chosen first: preferred) and 1 − p (rejected first: not). In
    one order alone every outcome would be 1; a random order is the same in expectation, with a coin's noise added.
    """
    chosen_first = 1.0 / (1.0 + np.exp(-np.asarray(margins, dtype=float)))
    predicted = np.concatenate([chosen_first, 1.0 - chosen_first])
    outcome = np.concatenate([np.ones_like(chosen_first), np.zeros_like(chosen_first)])
    index = np.minimum((predicted * num_bins).astype(int), num_bins - 1)
    return [
        CalibrationBin(
            float(predicted[index == b].mean()), float(outcome[index == b].mean()), int((index == b).sum())
        )
        for b in range(num_bins)
        if (index == b).any()
    ]


def expected_calibration_error(margins: Sequence[float], num_bins: int = 10) -> float:
    """ECE = Σ_b (n_b / n)·|predicted_b − observed_b| (Naeini et al. 2015; Guo et al. 2017), of `calibration_bins`."""
    bins = calibration_bins(margins, num_bins)
    total = sum(part.count for part in bins)
    return sum(part.count * abs(part.predicted - part.observed) for part in bins) / total


def margin_by_annotator(margins: Sequence[float], annotators: Sequence[str]) -> dict[str, float]:
    """Mean margin of each annotator's pairs, in alphabetical order."""
    values, names = np.asarray(margins, dtype=float), np.asarray(annotators)
    return {str(name): float(values[names == name].mean()) for name in np.unique(names)}


def write_calibration(margins: Sequence[float], folder: str | Path, num_bins: int = 10) -> None:
    """Write the reliability diagram into a folder: `calibration.json`, which `read_calibration` reads, and the picture."""
    bins = [asdict(part) for part in calibration_bins(margins, num_bins)]
    Path(folder, _CALIBRATION).write_text(json.dumps(bins, indent=2) + "\n", encoding="utf-8")
    plot_calibration(margins, Path(folder, "calibration.png"), num_bins)


def read_calibration(folder: str | Path) -> list[CalibrationBin]:
    """What `write_calibration` has left in a folder; nothing where it has not."""
    path = Path(folder, _CALIBRATION)
    if not path.is_file():
        return []
    return [CalibrationBin(**part) for part in json.loads(path.read_text(encoding="utf-8"))]


def plot_calibration(margins: Sequence[float], path: str | Path, num_bins: int = 10) -> None:
    """Save the reliability diagram as an image: observed against predicted, areas by the number of pairs."""
    bins = calibration_bins(margins, num_bins)
    largest = max(part.count for part in bins)
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], linestyle="--", color="0.6", label="perfectly calibrated")
    axes.plot([part.predicted for part in bins], [part.observed for part in bins], color="C0", linewidth=1)
    axes.scatter(
        [part.predicted for part in bins],
        [part.observed for part in bins],
        s=[20 + 180 * part.count / largest for part in bins],
        color="C0",
        label="held-out pairs (area: how many)",
    )
    axes.set(
        xlabel="predicted probability that the first response is preferred",
        ylabel="share of pairs where it was",
        title=f"Calibration (ECE {expected_calibration_error(margins, num_bins):.3f}, {len(margins)} pairs)",
        xlim=(0, 1),
        ylim=(0, 1),
        aspect="equal",
    )
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=120)
