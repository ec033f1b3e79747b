"""Which annotators can be relied on, told from the pairs that several of them have ordered."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

# A share of so many pairs is known to about ±0.2.
MIN_SHARED_PAIRS = 20


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
    # Of each two responses to a prompt, in a fixed order: who prefers the first.
    verdicts: dict[tuple[str, str, str], dict[str, bool]] = defaultdict(dict)
    for row in rows:
        if row.get("annotator"):
            prompt, chosen, rejected = (json.dumps(row[name]) for name in ("prompt", "chosen", "rejected"))
            first, second = sorted((chosen, rejected))
            verdicts[prompt, first, second][row["annotator"]] = chosen == first
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
