"""The simulated annotator: ranks responses by the gold judge, about as unreliably as people do.

Ranks follow Plackett–Luce (Bradley–Terry on pairs): P(i before j) = σ((g_i − g_j) / temperature) with g the gold
total; then, with a small probability, two of the responses exchange their places (a flipped label).
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Annotator:
    """One simulated person.

    Args:
        temperature: of the Bradley–Terry noise, in units of the gold total.
        flip_probability: of exchanging two responses in a finished ranking.
    """

    name: str
    temperature: float
    flip_probability: float


ANNOTATORS = (
    Annotator("annotator_0", 0.14, 0.04),
    Annotator("annotator_1", 0.2, 0.05),
    Annotator("annotator_2", 0.3, 0.08),
)


def rank(gold_totals: Sequence[float], rng: random.Random, annotator: Annotator = ANNOTATORS[1]) -> list[int]:
    """Rank responses with noise.

    Args:
        gold_totals: gold total of each response.
        rng: source of the noise.
        annotator: who ranks.

    Returns:
        The rank of each response, 1 = best, without ties.
    """
    # Gumbel noise on the scores makes their order a sample of Plackett–Luce.
    utilities = [
        total / annotator.temperature - math.log(-math.log(1.0 - rng.random() + 1e-300))
        for total in gold_totals
    ]
    order = sorted(range(len(utilities)), key=lambda i: -utilities[i])
    if len(order) > 1 and rng.random() < annotator.flip_probability:
        i, j = rng.sample(range(len(order)), 2)
        order[i], order[j] = order[j], order[i]
    ranks = [0] * len(order)
    for place, i in enumerate(order, start=1):
        ranks[i] = place
    return ranks


def annotate(
    gold_totals: Sequence[float], seed: int, prompt_id: str, num_annotators: int = 1
) -> list[tuple[list[int], str]]:
    """Have some of `ANNOTATORS`, drawn at random, each rank the responses to a prompt.

    The draw depends on `seed` and `prompt_id` alone, so prompts may be ranked in any order and again.

    Returns:
        For each of them the ranks (1 = best) and the annotator's name.
    """
    rng = random.Random(f"annotate/{seed}/{prompt_id}")
    drawn = rng.sample(ANNOTATORS, num_annotators)
    return [(rank(gold_totals, rng, annotator), annotator.name) for annotator in drawn]
