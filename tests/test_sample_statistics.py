import math
from itertools import combinations, product

import numpy as np
import pytest

from tieback.pipeline.sample_statistics import (
    best_of_n,
    best_of_n_kl,
    bootstrap_interval,
    correlation,
    distinct_n,
    distinct_texts,
    repeated_n,
    win_outcomes,
)


def test_a_tie_counts_half():
    assert win_outcomes([2.0, 1.0, 0.0], [1.0, 1.0, 1.0]).tolist() == [1.0, 0.5, 0.0]


def test_win_rates_of_the_two_sides_add_up_to_one():
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 4, 500), rng.integers(0, 4, 500)  # many ties
    assert win_outcomes(first, second).mean() + win_outcomes(second, first).mean() == pytest.approx(
        1.0, abs=1e-12
    )


def test_only_pairs_of_one_prompt_are_compared():
    # The same scores as unpaired sets, so only pairing tells them apart.
    first, second = [1.0, 2.0, 3.0], [0.5, 1.5, 2.5]
    assert win_outcomes(first, second).mean() == 1.0
    assert win_outcomes(first, second[::-1]).mean() == pytest.approx(2 / 3)


@pytest.mark.parametrize("pair", [([1.0], [1.0, 2.0]), ([], []), ([[1.0]], [[1.0]])])
def test_lists_that_do_not_match_are_refused(pair):
    with pytest.raises(ValueError, match="two equally long lists"):
        win_outcomes(*pair)


def test_nan_is_neither_a_win_nor_a_loss():
    with pytest.raises(ValueError, match=r"1 pairs are NaN \(the first is pair 2\)"):
        win_outcomes([1.0, math.nan], [0.0, 0.0])


def test_bootstrap_matches_the_enumerated_distribution_of_resamples():
    # All 4^4 resamples of four outcomes are equally likely: the interval's ends are that distribution's quantiles.
    outcomes = [0.0, 0.5, 1.0, 1.0]
    means = np.sort([np.mean(resample) for resample in product(outcomes, repeat=4)])
    exact = np.quantile(means, [0.025, 0.975])
    assert bootstrap_interval(outcomes, resamples=200_000) == pytest.approx(exact, abs=1e-12)


def test_bootstrap_matches_binomial_quantiles():
    # Resampling 0/1 outcomes gives Binomial(n, k/n)/n exactly.
    n, wins = 300, 246
    cdf = np.cumsum([math.comb(n, k) * (wins / n) ** k * (1 - wins / n) ** (n - k) for k in range(n + 1)])
    exact = [int(np.searchsorted(cdf, q)) / n for q in (0.025, 0.975)]
    outcomes = [1.0] * wins + [0.0] * (n - wins)
    assert bootstrap_interval(outcomes, resamples=100_000) == pytest.approx(exact, abs=1.01 / n)


def test_bootstrap_matches_the_normal_limit_for_any_outcomes():
    values = np.random.default_rng(1).normal(2.0, 3.0, 1000)
    half_width = 1.959964 * values.std() / math.sqrt(1000)
    low, high = bootstrap_interval(values, resamples=20_000)
    assert (low, high) == pytest.approx((values.mean() - half_width, values.mean() + half_width), abs=0.01)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(2)
    samples = rng.binomial(1, 0.7, size=(400, 200)).astype(float)
    covered = 0
    for number, sample in enumerate(samples):
        low, high = bootstrap_interval(sample, resamples=2000, seed=number)
        covered += low <= 0.7 <= high
    # 400 intervals: the standard error of the coverage is 1.1 points.
    assert 0.91 <= covered / 400 <= 0.98


def test_a_seed_gives_one_interval_and_the_order_of_the_prompts_does_not_matter():
    outcomes = np.random.default_rng(3).choice([0.0, 0.5, 1.0], 120)
    assert bootstrap_interval(outcomes, seed=5) == bootstrap_interval(outcomes[::-1], seed=5)


def test_equal_outcomes_have_no_width():
    assert bootstrap_interval([1.0] * 50) == (1.0, 1.0)


def test_too_few_resamples_or_outcomes_are_refused():
    with pytest.raises(ValueError, match="at least 2,000"):
        bootstrap_interval([0.0, 1.0], resamples=500)
    with pytest.raises(ValueError, match="at least one outcome"):
        bootstrap_interval([])


def test_distinct_n_counts_by_hand():
    texts = ["a b a b", "a b c"]  # pairs: ab ba ab | ab bc
    assert distinct_n(texts, 2) == 3 / 5
    assert distinct_n(texts, 1) == 3 / 7


def test_distinct_n_does_not_join_texts():
    assert distinct_n(["a", "b", "a", "b"], 2) == 0.0


def test_one_phrase_for_all_shows():
    assert distinct_texts(["Sure!"] * 50) == 1 / 50
    assert distinct_texts(["one", " one ", "two"]) == 2 / 3
    assert distinct_n(["I am happy to help"] * 100, 2) == 4 / 400


def test_repeated_n_counts_by_hand():
    assert repeated_n(["a b c d"], 2) == 0
    assert repeated_n(["a b a b a"], 2) == pytest.approx(2 / 4)  # ab ba ab ba
    assert repeated_n(["a b a b a", "a b"], 2) == pytest.approx(2 / 5), "other texts are no repetition"
    assert repeated_n(["a", ""], 2) == 0


def test_correlation_is_that_of_lines_and_of_nothing():
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert correlation([1, 2, 3], [5, 5, 5]) == 0
    assert correlation([1, 2, 3, 4], [1, -1, -1, 1]) == pytest.approx(0)


def test_best_of_n_is_the_mean_over_all_draws():
    rng = np.random.default_rng(0)
    scores, values = rng.normal(size=(5, 6)), rng.normal(size=(5, 6))
    for n in range(1, 7):
        expected = [
            np.mean(
                [values[row, max(draw, key=lambda i: scores[row, i])] for draw in combinations(range(6), n)]
            )
            for row in range(5)
        ]
        assert best_of_n(scores, values, n) == pytest.approx(np.mean(expected), abs=1e-12)
    assert best_of_n(scores, scores, 6) == pytest.approx(scores.max(axis=1).mean())
    assert best_of_n(scores, values, 1) == pytest.approx(values.mean())
    with pytest.raises(ValueError, match="Best of 7"):
        best_of_n(scores, values, 7)


def test_best_of_n_kl_is_that_of_the_enumerated_policy():
    """Of a policy over many equally likely responses with different scores, best-of-n has KL ln n − (n − 1)/n."""
    size, n = 20_000, 4
    upper, lower = np.arange(1, size + 1) / size, np.arange(size) / size
    chosen = upper**n - lower**n  # chance that the i-th best of all is the best of n
    exact = float(np.sum(chosen * np.log(chosen * size)))
    assert best_of_n_kl(n) == pytest.approx(exact, abs=1e-3)
    assert best_of_n_kl(1) == 0
