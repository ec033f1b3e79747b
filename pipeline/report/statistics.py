"""The statistics of an evaluation: win rate of paired scores, its bootstrap interval, and diversity of texts."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def win_outcomes(scores: ArrayLike, baseline: ArrayLike) -> NDArray[np.float64]:
    """Outcome of each pair: 1 where `scores` is the higher, 0 where `baseline` is, ½ for a tie.

    Args:
        scores: score of the first system's response to each prompt, [N].
        baseline: score of the second system's response to the same prompts in the same order, [N].

    Raises:
        ValueError: the two differ in length, are empty, or hold a NaN (which is neither a win nor a loss).
    """
    first, second = np.asarray(scores, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1 or first.size == 0:
        raise ValueError(
            f"A win rate needs two equally long lists of scores; got shapes {first.shape} and {second.shape}."
        )
    unknown = np.flatnonzero(np.isnan(first) | np.isnan(second))
    if unknown.size:
        raise ValueError(f"The scores of {unknown.size} pairs are NaN (the first is pair {unknown[0] + 1}).")
    return (first > second) + 0.5 * (first == second)


def bootstrap_interval(
    outcomes: ArrayLike, *, resamples: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `outcomes` (Efron 1979).

    The unit that is drawn with replacement is the prompt, so both systems' responses to it stay together: the
    interval is that of a paired comparison. Drawing N of N outcomes at random means drawing how often each distinct
    value occurs from a multinomial, which is done for all resamples at once.

    Args:
        outcomes: one number a prompt, [N].
        resamples: number of resamples.
        seed: seed of the resampling; the same outcomes and seed give the same interval.
        confidence: probability that the interval is meant to cover.

    Raises:
        ValueError: there is no outcome, or fewer than 2,000 resamples (the ends would be noise).
    """
    values, counts = np.unique(np.asarray(outcomes, dtype=np.float64), return_counts=True)
    size = int(counts.sum())
    if size == 0:
        raise ValueError("A bootstrap interval needs at least one outcome.")
    if resamples < 2000:
        raise ValueError(f"bootstrap resamples must be at least 2,000 for a 95% interval, not {resamples}.")
    draws = np.random.default_rng(seed).multinomial(size, counts / size, size=resamples)
    low, high = np.quantile(draws @ values / size, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams of words over all n-grams of all `texts` (Li et al. 2016, "A diversity-promoting objective").

    1 where no n-gram occurs twice; near 0 where every text says the same; 0 where no text has n words. It falls as
    the texts grow in number and length, so compare only equally many texts of similar length.
    """
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def distinct_texts(texts: Sequence[str]) -> float:
    """Number of different texts over the number of `texts`: 1/N where one phrase answers everything."""
    return len({" ".join(text.split()) for text in texts}) / len(texts)
