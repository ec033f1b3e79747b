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
from tieback.pipeline.labelling.quality import hasty_figures, known_figures
from tieback.pipeline.sample_statistics import bootstrap_interval


class _Preference(NamedTuple):
    """One annotator's verdict on two responses: 1 the first is better, −1 the second, 0 a tie."""

    item: Item
    judgement: Judgement
    first: int
    second: int
    verdict: int


def judgement_figures(
    items: Sequence[Item], judgements: Sequence[Judgement], with_known_ranks: Sequence[Item] = ()
) -> dict[str, float]:
    """Figures over the judgements of these items.

    Args:
        items: that were to be judged.
        judgements: of these, and of others.
        with_known_ranks: items that were mixed in for their known answers, which count for `gold/` alone.

    Returns:
        Counts (`judgements`, `items/judged`, `items/left`, `items/by_several`, `items/disputed`, `adjudicated`, `flagged/<flag>`,
        `ties/share`, `judgements/by/<annotator>`, `hasty/<annotator>`), `gold/accuracy/<annotator>` with `gold/pairs/<annotator>`, `seconds/median`, and, where there is anything to say it of:
        `agreement/shared_pairs` (pairs of responses that several annotators judged), `agreement/alpha` (Krippendorff's, nominal, over pairs of responses: 1 perfect, 0 chance),
        `agreement/pairwise` (share of pairs that two annotators order alike, ties left out),
        `bias/first_shown` and `bias/longer` (share of untied pairs won by the response shown first, or the longer one;
        0.5 is no bias of place) with the ends of a 95% bootstrap interval, `ratings/<aspect>` (mean).
    """
    mixed_in = {item.item_id for item in with_known_ranks}
    by_id = {item.item_id: item for item in items if item.item_id not in mixed_in}
    known = [judgement for judgement in judgements if judgement.item_id in by_id]
    settled = {judgement.item_id for judgement in known if judgement.settles}
    per_item = Counter(judgement.item_id for judgement in known)
    preferences = list(_preferences(by_id, known))
    untied = [preference for preference in preferences if preference.verdict]
    figures: dict[str, float] = {
        "judgements": len(known),
        "judgements/of_other_files": sum(
            judgement.item_id not in by_id and judgement.item_id not in mixed_in for judgement in judgements
        ),
        "items/judged": len(per_item),
        "items/left": len(by_id) - len(per_item),
        "items/by_several": sum(count > 1 for count in per_item.values()),
    }
    for annotator, count in sorted(Counter(judgement.annotator for judgement in known).items()):
        figures[f"judgements/by/{annotator}"] = count
    for flag, count in sorted(Counter(j.flag for j in known if j.flag is not None).items()):
        figures[f"flagged/{flag}"] = count
    disputed = disputed_items(known) - settled
    figures |= {"items/disputed": len(disputed)} if disputed else {}
    figures |= {"adjudicated": len(settled)} if settled else {}
    figures |= hasty_figures(items, known) | known_figures(with_known_ranks, judgements)
    timed = [judgement.seconds for judgement in known if judgement.seconds > 0]
    if timed:
        figures["seconds/median"] = median(timed)
    if preferences:
        figures["ties/share"] = 1 - len(untied) / len(preferences)
    for aspect in ASPECTS:
        ratings = [v for j in known for v in j.ratings.get(aspect, []) if v is not None]
        if ratings:
            figures[f"ratings/{aspect}"] = fmean(ratings)
    # An adjudication is of items that were chosen for their disagreement.
    figures |= _agreement([each for each in preferences if not each.judgement.adjudicates])
    figures |= _share("bias/first_shown", [_won_by_first_shown(preference) for preference in untied])
    longer = [won for preference in untied if (won := _won_by_longer(preference)) is not None]
    return figures | _share("bias/longer", longer)


def disputed_items(judgements: Sequence[Judgement]) -> set[str]:
    """Ids of the items of which two annotators put some two responses in opposite orders; a tie disputes nothing."""
    verdicts: dict[tuple[str, int, int], set[int]] = defaultdict(set)
    for judgement in judgements:
        for (first, one), (second, other) in combinations(enumerate(judgement.ranks or ()), 2):
            verdicts[judgement.item_id, first, second].add((other > one) - (other < one))
    return {item_id for (item_id, *_), signs in verdicts.items() if {1, -1} <= signs}


def agreement_matrix(
    items: Sequence[Item], judgements: Sequence[Judgement]
) -> dict[tuple[str, str], tuple[float, int]]:
    """For each two annotators who share some: share of the pairs of responses that they order alike, ties left out, and how many there are."""
    by_id = {item.item_id: item for item in items}
    known = [each for each in judgements if each.item_id in by_id and not each.adjudicates]
    alike: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for by_annotator in _verdicts(list(_preferences(by_id, known))).values():
        for (one, first), (other, second) in combinations(sorted(by_annotator.items()), 2):
            if first and second:
                alike[one, other].append(first == second)
    return {names: (fmean(outcomes), len(outcomes)) for names, outcomes in sorted(alike.items())}


def _verdicts(preferences: Sequence[_Preference]) -> dict[tuple[str, int, int], dict[str, int]]:
    verdicts: dict[tuple[str, int, int], dict[str, int]] = defaultdict(dict)
    for item, judgement, first, second, verdict in preferences:
        verdicts[item.item_id, first, second][judgement.annotator] = verdict
    return verdicts


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
    shared = [by_annotator for by_annotator in _verdicts(preferences).values() if len(by_annotator) > 1]
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
