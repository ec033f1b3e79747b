"""Figures of judgements: their number, the agreement of annotators, and the bias towards place or length."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations
from statistics import fmean, median
from typing import NamedTuple

import krippendorff
import numpy as np

from tieback.pipeline.labelling.items import Item
from tieback.pipeline.labelling.judgements import ASPECTS, Judgement
from tieback.pipeline.sample_statistics import bootstrap_interval


class _Preference(NamedTuple):
    """One annotator's verdict on two responses: 1 the first is better, −1 the second, 0 a tie."""

    item: Item
    judgement: Judgement
    first: int
    second: int
    verdict: int


def judgement_figures(items: Sequence[Item], judgements: Sequence[Judgement]) -> dict[str, float]:
    """Figures over the judgements of these items.

    Returns:
        Counts (`judgements`, `items/judged`, `items/left`, `items/by_several`, `flagged/<flag>`, `ties/share`,
        `judgements/by/<annotator>`), `seconds/median`, and, where there is anything to say it of:
        `agreement/shared_pairs` (pairs of responses that several annotators judged), `agreement/alpha` (Krippendorff's, nominal, over pairs of responses: 1 perfect, 0 chance),
        `agreement/pairwise` (share of pairs that two annotators order alike, ties left out),
        `bias/first_shown` and `bias/longer` (share of untied pairs won by the response shown first, or the longer one;
        0.5 is no bias of place) with the ends of a 95% bootstrap interval, `ratings/<aspect>` (mean).
    """
    by_id = {item.item_id: item for item in items}
    known = [judgement for judgement in judgements if judgement.item_id in by_id]
    per_item = Counter(judgement.item_id for judgement in known)
    preferences = list(_preferences(by_id, known))
    untied = [preference for preference in preferences if preference.verdict]
    figures: dict[str, float] = {
        "judgements": len(known),
        "judgements/of_other_files": len(judgements) - len(known),
        "items/judged": len(per_item),
        "items/left": len(items) - len(per_item),
        "items/by_several": sum(count > 1 for count in per_item.values()),
    }
    for annotator, count in sorted(Counter(judgement.annotator for judgement in known).items()):
        figures[f"judgements/by/{annotator}"] = count
    for flag, count in sorted(Counter(j.flag for j in known if j.flag is not None).items()):
        figures[f"flagged/{flag}"] = count
    timed = [judgement.seconds for judgement in known if judgement.seconds > 0]
    if timed:
        figures["seconds/median"] = median(timed)
    if preferences:
        figures["ties/share"] = 1 - len(untied) / len(preferences)
    for aspect in ASPECTS:
        ratings = [v for j in known for v in j.ratings.get(aspect, []) if v is not None]
        if ratings:
            figures[f"ratings/{aspect}"] = fmean(ratings)
    figures |= _agreement(preferences)
    figures |= _share("bias/first_shown", [_won_by_first_shown(preference) for preference in untied])
    longer = [won for preference in untied if (won := _won_by_longer(preference)) is not None]
    return figures | _share("bias/longer", longer)


def _preferences(by_id: dict[str, Item], judgements: Sequence[Judgement]) -> Iterator[_Preference]:
    for judgement in judgements:
        if judgement.ranks is None:
            continue
        for first, second in combinations(range(len(judgement.ranks)), 2):
            difference = judgement.ranks[second] - judgement.ranks[first]
            yield _Preference(
                by_id[judgement.item_id], judgement, first, second, (difference > 0) - (difference < 0)
            )


def _agreement(preferences: Sequence[_Preference]) -> dict[str, float]:
    """Krippendorff's alpha (2011, "Computing Krippendorff's alpha-reliability") and the raw share, over shared pairs."""
    verdicts: dict[tuple[str, int, int], dict[str, int]] = defaultdict(dict)
    for item, judgement, first, second, verdict in preferences:
        verdicts[item.item_id, first, second][judgement.annotator] = verdict
    shared = [by_annotator for by_annotator in verdicts.values() if len(by_annotator) > 1]
    if not shared:
        return {}
    alike = [
        one == other
        for by_annotator in shared
        for one, other in combinations(by_annotator.values(), 2)
        if one and other
    ]
    figures: dict[str, float] = {"agreement/shared_pairs": len(shared)}
    if alike:
        figures["agreement/pairwise"] = fmean(alike)
    annotators = sorted({annotator for by_annotator in shared for annotator in by_annotator})
    # Which response of a pair comes first means nothing, so each pair counts both ways round.
    table = np.array(
        [
            [sign * by_annotator.get(annotator, np.nan) for by_annotator in shared for sign in (1, -1)]
            for annotator in annotators
        ],
        dtype=float,
    )
    if len(np.unique(table[~np.isnan(table)])) > 1:
        figures["agreement/alpha"] = float(
            krippendorff.alpha(reliability_data=table, level_of_measurement="nominal")
        )
    return figures


def _won_by_first_shown(preference: _Preference) -> bool:
    order = preference.judgement.order
    first_is_above = order.index(preference.first) < order.index(preference.second)
    return first_is_above == (preference.verdict > 0)


def _won_by_longer(preference: _Preference) -> bool | None:
    """Whether the longer response won; None where they are equally long."""
    responses = preference.item.row["responses"]
    first, second = len(responses[preference.first]), len(responses[preference.second])
    return None if first == second else (first > second) == (preference.verdict > 0)


def _share(name: str, outcomes: Sequence[bool]) -> dict[str, float]:
    if not outcomes:
        return {}
    low, high = bootstrap_interval(outcomes)
    return {name: fmean(outcomes), f"{name}/ci95_low": low, f"{name}/ci95_high": high}
