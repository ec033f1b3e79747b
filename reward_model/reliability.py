"""Which annotators, and which pairs, can be relied on, told from the pairs that several annotators have ordered."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

# A share of so many pairs is known to about ±0.2.
MIN_SHARED_PAIRS = 20

# A prompt and two responses to it, as JSON.
_Pair = tuple[str, str, str]


class Agreement(NamedTuple):
    """How an annotator orders pairs that others have ordered, too.

    Args:
        share: of the pairs, that the annotator orders as most of the others do.
        pairs: their number; those over which the others are divided evenly are left out.
    """

    share: float
    pairs: int


def agreement_with_others(rows: Iterable[Mapping[str, Any]]) -> dict[str, Agreement]:
    """For each annotator who has ordered MIN_SHARED_PAIRS pairs that others have: the agreement with the majority of them.

    Args:
        rows: preference pairs with `prompt`, `chosen`, `rejected` and `annotator`; one without an annotator is left out.
    """
    # Of each two responses to a prompt: who prefers the first of them.
    verdicts: dict[_Pair, dict[str, bool]] = defaultdict(dict)
    for row in rows:
        if row.get("annotator"):
            pair, prefers_first = _verdict(row)
            verdicts[pair][row["annotator"]] = prefers_first
    outcomes: dict[str, list[bool]] = defaultdict(list)
    for by_annotator in verdicts.values():
        for annotator, verdict in by_annotator.items():
            others = [1 if other else -1 for name, other in by_annotator.items() if name != annotator]
            if sum(others):
                outcomes[annotator].append((sum(others) > 0) == verdict)
    return {
        annotator: Agreement(sum(alike) / len(alike), len(alike))
        for annotator, alike in sorted(outcomes.items())
        if len(alike) >= MIN_SHARED_PAIRS
    }


def merge_votes(rows: Iterable[Mapping[str, Any]], least_share: float) -> tuple[list[int], int]:
    """One row for each two responses to a prompt: as most of the rows about them, each a vote, order them.

    Args:
        rows: preference pairs with `prompt`, `chosen` and `rejected`.
        least_share: of the votes, from 0.5 to 1, that the preferred response needs; with half of them it is never preferred.

    Returns:
        The numbers of the rows that stay, of several alike the first, and how many pairs of responses have none.
    """
    votes: dict[_Pair, dict[bool, list[int]]] = defaultdict(lambda: {True: [], False: []})
    for number, row in enumerate(rows):
        pair, prefers_first = _verdict(row)
        votes[pair][prefers_first].append(number)
    kept = []
    for by_verdict in votes.values():
        fewer, more = sorted(by_verdict.values(), key=len)
        if len(more) > len(fewer) and len(more) / (len(more) + len(fewer)) >= least_share:
            kept.append(more[0])
    return sorted(kept), len(votes) - len(kept)


def _verdict(row: Mapping[str, Any]) -> tuple[_Pair, bool]:
    """The prompt and its two responses, in a fixed order, and whether the row prefers the first of them."""
    prompt, chosen, rejected = (json.dumps(row[name]) for name in ("prompt", "chosen", "rejected"))
    first, second = sorted((chosen, rejected))
    return (prompt, first, second), chosen == first
