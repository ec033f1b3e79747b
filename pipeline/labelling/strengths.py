"""Several policies, compared two at a time: the strength of each, by the model of Bradley and Terry.

P(i is preferred to j) = s_i / (s_i + s_j): Bradley and Terry 1952, "Rank Analysis of Incomplete Block Designs". The strengths are those of
the greatest likelihood, by the steps of Hunter 2004, "MM Algorithms for Generalized Bradley–Terry Models"; a tie is half a win for each.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tieback.pipeline.labelling.items import Item
from tieback.pipeline.labelling.judgements import Judgement, standing

_STEPS = 10_000
_CHANGE = 1e-10
# Wins that are added to those of each over each: a policy that never lost would be infinitely strong.
_PRIOR = 0.5
_RESAMPLES = 1000


class Strength(NamedTuple):
    """One policy among those compared.

    Args:
        policy: its name.
        strength: log s, of mean 0 over the policies; a difference of 1 is odds of e : 1.
        low: end of a 95% interval, by bootstrap over prompts.
        high: the other end.
        won: share of its comparisons that it won, ties half.
        comparisons: number of them.
    """

    policy: str
    strength: float
    low: float
    high: float
    won: float
    comparisons: int


def strengths(items: Sequence[Item], judgements: Sequence[Judgement], seed: int = 0) -> list[Strength]:
    """The policies that people compared, the strongest first; none where nothing is judged.

    Args:
        items: of two responses, with `systems`, each two names of policies that wrote them.
        judgements: of these, and of others.
        seed: of the bootstrap.
    """
    by_id = {item.item_id: item for item in items}
    # For each prompt the wins in it: people judge several pairs of one prompt, which are no independent draws.
    of_prompt: dict[str, list[tuple[str, str, float]]] = defaultdict(list)
    for judgement in standing(judgements):
        if judgement.item_id in by_id and judgement.ranks is not None:
            item, (first, second) = by_id[judgement.item_id], judgement.ranks
            outcome = 0.5 + 0.5 * ((first < second) - (first > second))
            of_prompt[str(item.row["prompt"])] += [
                (one, other, outcome) for one, other in item.row["systems"]
            ]
    prompts = list(of_prompt.values())
    names = sorted({name for wins in prompts for one, other, _ in wins for name in (one, other)})
    if not names:
        return []
    tables = np.stack([_wins(wins, names) for wins in prompts])
    total = tables.sum(axis=0)
    fitted = bradley_terry(total)
    generator = np.random.default_rng(seed)
    drawn = [
        bradley_terry(tables[generator.integers(len(tables), size=len(tables))].sum(axis=0))
        for _ in range(_RESAMPLES)
    ]
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    met = total + total.T
    found = [
        Strength(
            policy=name,
            strength=float(fitted[i]),
            low=float(low[i]),
            high=float(high[i]),
            won=float(total[i].sum() / met[i].sum()),
            comparisons=round(met[i].sum()),
        )
        for i, name in enumerate(names)
    ]
    return sorted(found, key=lambda each: -each.strength)


def bradley_terry(wins: np.ndarray) -> np.ndarray:
    """Log strengths [M], of mean 0, from the wins [M, M] of each over each."""
    wins = wins + _PRIOR * (1 - np.eye(len(wins)))
    met = wins + wins.T
    strength = np.ones(len(wins))
    for _ in range(_STEPS):
        share = met / (strength[:, None] + strength[None, :])
        following = wins.sum(axis=1) / share.sum(axis=1)
        following /= np.exp(np.log(following).mean())
        done = np.abs(np.log(following / strength)).max() < _CHANGE
        strength = following
        if done:
            break
    return np.log(strength)


def _wins(wins: Sequence[tuple[str, str, float]], names: Sequence[str]) -> np.ndarray:
    table = np.zeros((len(names), len(names)))
    for one, other, outcome in wins:
        table[names.index(one), names.index(other)] += outcome
        table[names.index(other), names.index(one)] += 1 - outcome
    return table
