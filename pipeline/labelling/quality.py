"""How far judgements can be relied on: those made faster than anyone reads, and those of items whose answer is known."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations

from tieback.data.conversations import as_messages
from tieback.pipeline.labelling.items import Item
from tieback.pipeline.labelling.judgements import Judgement

# About 900 words of English a minute, nearly four times the speed of silent reading (238; Brysbaert 2019, "How many words do we read per
# minute?"): who is faster has not read, but skimmed at best.
READ_CHARACTERS_A_SECOND = 90
# A coin orders half of the pairs rightly; of 20 pairs a share of 0.7 is known to about ±0.2.
MIN_KNOWN_PAIRS = 20


def is_hasty(judgement: Judgement, item: Item) -> bool:
    """Whether the annotator cannot have read prompt and responses; not told where the time is unknown, or for a flag."""
    if judgement.seconds <= 0 or judgement.ranks is None:
        return False
    texts = [message["content"] for message in as_messages(item.row["prompt"])] + item.row["responses"]
    return judgement.seconds < sum(map(len, texts)) / READ_CHARACTERS_A_SECOND


def hasty_figures(items: Sequence[Item], judgements: Sequence[Judgement]) -> dict[str, float]:
    """`hasty/<annotator>`: of whoever has any, judgements faster than anyone reads."""
    by_id = {item.item_id: item for item in items}
    counts: dict[str, float] = defaultdict(int)
    for judgement in judgements:
        if judgement.item_id in by_id and is_hasty(judgement, by_id[judgement.item_id]):
            counts[f"hasty/{judgement.annotator}"] += 1
    return dict(sorted(counts.items()))


def known_figures(known: Sequence[Item], judgements: Sequence[Judgement]) -> dict[str, float]:
    """`gold/accuracy/<annotator>`: pairs of responses with a known order that they order so (a tie does not), and `gold/pairs/<annotator>`."""
    by_id = {item.item_id: item for item in known}
    outcomes: dict[str, list[bool]] = defaultdict(list)
    for judgement in judgements:
        if judgement.item_id in by_id and judgement.ranks is not None:
            outcomes[judgement.annotator] += _right(by_id[judgement.item_id].row["ranks"], judgement.ranks)
    figures: dict[str, float] = {}
    for annotator, right in sorted(outcomes.items()):
        figures[f"gold/accuracy/{annotator}"] = sum(right) / len(right)
        figures[f"gold/pairs/{annotator}"] = len(right)
    return figures


def unreliable(known: Sequence[Item], judgements: Sequence[Judgement], least: float) -> set[str]:
    """Annotators who order less than a share `least` of the known pairs as known; not told from fewer than MIN_KNOWN_PAIRS."""
    figures = known_figures(known, judgements)
    annotators = {name.removeprefix("gold/pairs/") for name in figures if name.startswith("gold/pairs/")}
    return {
        annotator
        for annotator in annotators
        if figures[f"gold/pairs/{annotator}"] >= MIN_KNOWN_PAIRS
        and figures[f"gold/accuracy/{annotator}"] < least
    }


def _right(known: Sequence[int], given: Sequence[int]) -> Iterator[bool]:
    for first, second in combinations(range(len(known)), 2):
        if known[first] != known[second]:
            better, worse = sorted((first, second), key=lambda index: known[index])
            yield given[better] < given[worse]
