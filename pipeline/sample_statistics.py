"""The statistics of an evaluation: win rate of paired scores, its bootstrap interval, and diversity of texts."""

import math
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


def repeated_n(texts: Sequence[str], n: int) -> float:
    """Share of all n-grams of words that stood earlier in the same text already (Welleck et al. 2020, "seq-rep-n").

    0 where no text repeats itself or none has n words.
    """
    grams = [[tuple(words[i : i + n]) for i in range(len(words) - n + 1)] for words in map(str.split, texts)]
    total = sum(map(len, grams))
    return 1 - sum(len(set(own)) for own in grams) / total if total else 0.0


def correlation(first: ArrayLike, second: ArrayLike) -> float:
    """Pearson's correlation of two lists of N numbers; 0 where one of them does not vary."""
    x, y = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def best_of_n(scores: ArrayLike, values: ArrayLike, n: int) -> float:
    """Mean value of the response with the highest score among n drawn from N, over all ways to draw them.

    Unbiased for a best-of-n policy, from N ≥ n samples (Nakano et al. 2021, "WebGPT", equation in section 3; Gao et
    al. 2022). Where scores tie, the value is that of one of the tied.

    Args:
        scores: what the choice goes by, [prompts, N].
        values: what is averaged, of the same shape; the scores themselves, or a judge's.
        n: responses to choose from.

    Raises:
        ValueError: n is not within 1 and N.
    """
    by, what = np.asarray(scores, dtype=np.float64), np.asarray(values, dtype=np.float64)
    count = by.shape[1]
    if not 1 <= n <= count:
        raise ValueError(f"Best of {n} cannot be told from {count} samples a prompt.")
    # The i-th in ascending order is the best of n in C(i, n − 1) of the C(N, n) draws.
    weights = np.array([math.comb(i, n - 1) for i in range(count)]) / math.comb(count, n)
    ordered = np.take_along_axis(what, np.argsort(by, axis=1, kind="stable"), axis=1)
    return float((ordered @ weights).mean())


def best_of_n_kl(n: int) -> float:
    """KL of a best-of-n policy to the one it draws from, in nats: ln n − (n − 1)/n (Stiennon et al. 2020).

    An upper bound, reached where all responses differ (Beirami et al. 2024).
    """
    return math.log(n) - (n - 1) / n
