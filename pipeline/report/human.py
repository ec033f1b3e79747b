"""People's blind comparisons of SFT with PPO (`python -m pipeline.label --compare`), as figures."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from tieback.pipeline.labelling.items import content_hash
from tieback.pipeline.labelling.judgements import JudgementLog, standing
from tieback.pipeline.report.pairs import SYSTEMS, Pair
from tieback.pipeline.sample_statistics import bootstrap_interval


def human_figures(log_path: Path, pairs: Sequence[Pair], resamples: int, seed: int) -> dict[str, float]:
    """PPO's win rate by people's judgements of these very pairs, with a bootstrap interval over prompts.

    Where several people judged a pair, its outcome is their mean.

    Returns:
        `human/win_rate`, `human/ci95_low`, `human/ci95_high`, `human/num_prompts`, `human/num_judgements` and
        `human/agreement_with_judge` (share of the judge's wins and losses that people's majority confirms); nothing
        where nobody has judged any of the pairs.
    """
    log = JudgementLog(log_path)
    log.refresh()
    outcomes: dict[str, list[float]] = defaultdict(list)
    for judgement in standing(log.judgements.values()):
        if judgement.ranks is not None:
            sft, ppo = judgement.ranks
            outcomes[judgement.item_id].append(0.5 + 0.5 * ((ppo < sft) - (ppo > sft)))
    item_ids = [content_hash(pair["prompt"], [pair[name]["response"] for name in SYSTEMS]) for pair in pairs]
    judged = {number: outcomes[item_id] for number, item_id in enumerate(item_ids) if item_id in outcomes}
    if not judged:
        return {}
    by_pair = {number: fmean(values) for number, values in judged.items()}
    low, high = bootstrap_interval(list(by_pair.values()), resamples=resamples, seed=seed)
    figures: dict[str, float] = {
        "human/win_rate": fmean(by_pair.values()),
        "human/ci95_low": low,
        "human/ci95_high": high,
        "human/num_prompts": len(by_pair),
        "human/num_judgements": sum(map(len, judged.values())),
    }
    decided = [
        (outcome > 0.5) == (pairs[number]["outcome"] > 0.5)
        for number, outcome in by_pair.items()
        if outcome != 0.5 and pairs[number]["outcome"] != 0.5
    ]
    if decided:
        figures["human/agreement_with_judge"] = fmean(decided)
    return figures
