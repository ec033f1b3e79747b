"""What each nat of KL to the reference bought: PPO at its evaluations, beside best-of-n of SFT."""

from collections.abc import Mapping, Sequence
from typing import Any

from tieback.pipeline.report.curves import Curve, line_chart, logged_names
from tieback.pipeline.report.html_parts import number

_SCORES = {"gold_score": "gold score", "reward_score": "reward-model score"}


def reward_against_kl_html(
    history: Sequence[dict[str, Any]],
    frontier: Sequence[dict[str, float]],
    reward_name: str,
    metrics: Mapping[str, float],
    judged_by_gold: bool,
) -> str:
    """PPO's path and, where it was computed, best-of-n of SFT: by the reward model, and by the gold judge.

    Each chart has raw scores of one judge. Where PPO's log has none of the reward model that best-of-n chooses by (it learnt from
    others), its own weighted score is drawn, and best-of-n, which is on another scale, is left to the table.

    Args:
        history: PPO's log.
        frontier: see `Report`.
        reward_name: under which PPO logs the reward model that best-of-n chooses by.
        metrics: of the evaluation.
        judged_by_gold: whether the judges of the training are the gold judges of the evaluation.
    """
    is_same_model = f"reward/{reward_name}" in logged_names(history)
    score = f"reward/{reward_name}" if is_same_model else "reward/mean"
    charts = [_chart(history, frontier if is_same_model else (), score, "reward_score", "Reward model")]
    if judged_by_gold:
        charts.append(_chart(history, frontier, "judge/mean", "gold_score", "Gold judge"))
    if not charts[0]:
        return ""
    table = _frontier_table(frontier) if len(frontier) > 1 else ""
    return (
        '<h2>Reward against KL</h2><p class="note">A score bought with much KL is the more likely to be the reward model’s '
        "weakness rather than a better answer. Scores are the raw ones, as the evaluation gives them. Best-of-n is what choosing "
        f"alone reaches: no training, but n responses for one.{_verdict(metrics, frontier)}</p>"
        f'<div class="charts">{"".join(charts)}{table}</div>'
    )


def _chart(
    history: Sequence[dict[str, Any]],
    frontier: Sequence[dict[str, float]],
    logged: str,
    score: str,
    label: str,
) -> str:
    points, source = _points(history, logged)
    if points is None:
        return ""
    note = f'<b>{label}</b> <span class="ppo">• PPO, {source}, the later the stronger</span>'
    best_of = None
    if len(frontier) > 1 and score in frontier[0]:
        xs, ys = zip(*((point["kl"], point[score]) for point in frontier), strict=True)
        best_of = Curve("best of n", xs, ys)
        note += f' <span class="sft">- - best of 1 to {int(frontier[-1]["n"])} of SFT, chosen by the reward model</span>'
    chart = line_chart(
        [None, best_of], f"{label} against KL", "KL to the reference (nats)", "raw score", points=points
    )
    return f"<figure><figcaption>{note}</figcaption>{chart}</figure>"


def _points(history: Sequence[dict[str, Any]], logged: str) -> tuple[Curve | None, str]:
    """KL and score at the evaluations of the training, or else at its iterations; and which of both."""
    for prefix, source in (("eval_", "at its evaluations"), ("", "iteration by iteration")):
        names = (f"{prefix}kl/ref", f"{prefix}{logged}")
        found = [
            tuple(entry[name] for name in names) for entry in history if all(name in entry for name in names)
        ]
        if len(found) > 1:
            kls, scores = zip(*found, strict=True)
            return Curve("PPO", kls, scores), source
    return None, ""


def _verdict(metrics: Mapping[str, float], frontier: Sequence[dict[str, float]]) -> str:
    """PPO beside the largest n, both on the prompts of the evaluation; empty where one of them is not there."""
    for score, name in _SCORES.items():
        wanted = (f"{score}/ppo", "kl/ppo_vs_sft")
        if len(frontier) > 1 and score in frontier[-1] and all(key in metrics for key in wanted):
            most = frontier[-1]
            return (
                f" On the prompts of this evaluation PPO’s {name} is {number(metrics[wanted[0]], 2)} at "
                f"{number(metrics[wanted[1]], 1)} nats, that of the best of {int(most['n'])} responses of SFT "
                f"{number(most[score], 2)} at {number(most['kl'], 1)}."
            )
    return ""


def _frontier_table(frontier: Sequence[dict[str, float]]) -> str:
    names = [name for name in ("kl", "reward_score", "gold_score") if name in frontier[0]]
    labels = {"kl": "KL", "reward_score": "reward model", "gold_score": "gold"}
    head = "".join(f'<th scope="col">{labels[name]}</th>' for name in names)
    rows = "".join(
        f"<tr><td>best of {int(point['n'])}</td>{''.join(f'<td>{number(point[name], 2)}</td>' for name in names)}</tr>"
        for point in frontier
    )
    return f'<div class="scroll"><table class="frontier"><thead><tr><th scope="col">SFT</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
