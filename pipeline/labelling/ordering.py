"""Order in which items are shown: first those whose ranking reward models are least sure of, where a judgement teaches most."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from tieback.pipeline.labelling.items import Item
from tieback.pipeline.scorers import load_reward_scorer


def most_uncertain_first(items: Sequence[Item], names: Sequence[str]) -> list[Item]:
    """Order items by the uncertainty of reward models about them, the most uncertain first.

    Args:
        items: to order.
        names: folders or hub names of reward models.

    Raises:
        UsageError: no reward model has that name.
    """
    prompts = [item.row["prompt"] for item in items for _ in item.row["responses"]]
    completions = [
        [{"role": "assistant", "content": text}] if isinstance(item.row["prompt"], list) else text
        for item in items
        for text in item.row["responses"]
    ]
    scorers = (load_reward_scorer(name, 64, "uncertain_to") for name in names)
    by_response = np.array([scorer.score(prompts, completions) for scorer in scorers])
    ends = np.cumsum([len(item.row["responses"]) for item in items])[:-1]
    uncertainties = [uncertainty(part) for part in np.split(by_response, ends, axis=1)]
    # The sort is stable: items of equal uncertainty stay in the file's order.
    return [items[index] for index in np.argsort(-np.array(uncertainties), kind="stable")]


def uncertainty(scores: NDArray[np.float64]) -> float:
    """Uncertainty of reward models about the order of K responses.

    Of one model: the mean over pairs of 4·p·(1 − p), where p = σ(difference of scores) is the chance that one is
    preferred: 1 where the scores are equal, near 0 where they are far apart. Of several: the mean over pairs of the
    standard deviation of p over the models, their disagreement (as in Christiano et al. 2017, section 2.2.4).

    Args:
        scores: [models, K].
    """
    preferred = np.array(
        [
            1 / (1 + np.exp(scores[:, second] - scores[:, first]))
            for first, second in combinations(range(scores.shape[1]), 2)
        ]
    )
    if scores.shape[0] == 1:
        return float((4 * preferred * (1 - preferred)).mean())
    return float(preferred.std(axis=1).mean())
