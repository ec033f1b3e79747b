"""The page's charts: PPO's curves, the stages before it, and the same diagnostics of Pong."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from tieback.pipeline.report.curves import Curve, curve, line_chart, logged_names
from tieback.pipeline.report.html_parts import escape, number, plain_table
from tieback.reward_model.report import CalibrationBin

History = Sequence[dict[str, Any]]

# Name in the log, what it is, more about it, unit.
_PPO_CURVES = (
    ("reward/mean", "Reward", "mean raw score, before normalising and penalties", "score"),
    ("kl/ref", "KL to the reference", "nats a completion", "nats"),
    ("policy/entropy", "Entropy", "of the policy, nats a token", "nats"),
    ("policy/clip_fraction", "Clip fraction", "share of tokens", "share"),
    ("value/loss", "Value loss", "of the critic", "loss"),
    ("completions/mean_length", "Completion length", "tokens", "tokens"),
)
_PHASES = {
    "time/generate": "sampling",
    "time/score": "scoring",
    "time/logprobs": "log-probabilities and values",
    "time/update": "the update",
}
# Logged under one name by every PPO of this project.
_SHARED = (
    ("policy/entropy", "Entropy", "nats an action", "nats"),
    ("policy/approx_kl", "Approximate KL", "of an update, nats an action", "nats"),
    ("policy/clip_fraction", "Clip fraction", "share of actions", "share"),
    ("value/explained_variance", "Explained variance", "of the returns, by the critic", "share"),
)


def ppo_html(history: History) -> str:
    """Curves of the PPO training."""
    figures = [
        _chart(history, name, label, note, "iteration", unit) for name, label, note, unit in _PPO_CURVES
    ]
    shown = {name for name, *_ in _PPO_CURVES}
    rest = sorted({name.removeprefix("eval_") for name in logged_names(history)} - shown)
    more = [
        chart for chart in (_chart(history, name, name, "", "iteration", "value") for name in rest) if chart
    ]
    if not any(figures) and not more:
        return '<h2>PPO training</h2><p class="note">No training log was found beside the PPO model.</p>'
    others = (
        f'<details><summary>All other logged figures ({len(more)})</summary><div class="charts">{"".join(more)}</div>'
        "</details>"
        if more
        else ""
    )
    return f'<h2>PPO training</h2><div class="charts">{"".join(figures)}</div>{_where_time_went(history)}{others}'


def _where_time_went(history: History) -> str:
    """What an iteration took, and what took it; empty where the log does not say (before time/* was logged)."""
    typical = {}
    for name in (*_PHASES, "tokens_per_second", "memory/peak"):
        values = [entry[name] for entry in history if name in entry]
        if not values:
            return ""
        typical[name] = max(values) if name == "memory/peak" else median(values)
    total = sum(typical[name] for name in _PHASES)
    shares = ", ".join(f"{label} {100 * typical[name] / total:.0f}%" for name, label in _PHASES.items())
    return (
        f'<p class="note">An iteration took {number(total, 1)} seconds (medians): {shares}. '
        f"{typical['tokens_per_second']:,.0f} tokens were sampled for each second of it, and a process held "
        f"{typical['memory/peak']:,.0f} MiB at most.</p>"
    )


def earlier_stages_html(
    histories: dict[str, list[dict[str, Any]]],
    calibration: Sequence[CalibrationBin],
    stage_metrics: dict[str, dict[str, float]],
    ranked_by: str,
) -> str:
    """Losses of SFT and of the reward model, its calibration, and every stage's figures.

    `ranked_by` says in words who ranked the pairs that the reward model learnt from.
    """
    charts = "".join(
        _chart(histories.get(stage, []), "loss", label, "", "step", "nats")
        for stage, label in (("sft", "SFT loss"), ("reward", "Reward-model loss"))
    )
    charts += _calibration_html(calibration)
    reward = stage_metrics.get("reward", {})
    bias = (
        f"<p>On held-out pairs the reward model prefers what {escape(ranked_by)} preferred in "
        f"{100 * reward['accuracy/held_out']:.1f}% of them; always choosing the longer response would be right in {100 * reward['accuracy/length_only']:.1f}%.</p>"
        if {"accuracy/held_out", "accuracy/length_only"} <= reward.keys()
        else ""
    )
    bias += _left_out_html(reward) + _disputed_html(reward)
    tables = "".join(
        f"<h3><code>{escape(stage)}/metrics.json</code></h3>{plain_table({k: f'{v:.4g}' for k, v in metrics.items()})}"
        for stage, metrics in stage_metrics.items()
    )
    if not (charts or tables):
        return ""
    details = f"<details><summary>Figures of the earlier stages</summary>{tables}</details>" if tables else ""
    return f'<h2>SFT and the reward model</h2>{bias}<div class="charts">{charts}</div>{details}'


def _calibration_html(bins: Sequence[CalibrationBin]) -> str:
    """Of held-out pairs: the share that is preferred against the probability that the reward model gives it."""
    if len(bins) < 2:
        return ""
    predicted, observed = (tuple(getattr(part, name) for part in bins) for name in ("predicted", "observed"))
    chart = line_chart(
        [Curve("held-out pairs", predicted, observed), Curve("perfectly calibrated", (0.0, 1.0), (0.0, 1.0))],
        "Calibration of the reward model",
        "predicted probability",
        "share preferred",
    )
    return (
        "<figure><figcaption><b>Calibration of the reward model</b>, held-out pairs; dashed: perfect</figcaption>"
        f"{chart}</figure>"
    )


def _left_out_html(reward: dict[str, float]) -> str:
    """What `least_agreement` has left out of the reward model's pairs; empty where it was not set."""
    shares = {
        name.removeprefix("agreement/"): share
        for name, share in reward.items()
        if name.startswith("agreement/")
    }
    if not shares:
        return ""
    count = int(reward["num_pairs/dropped_unreliable"])
    by_annotator = ", ".join(f"{escape(name)} {100 * share:.0f}%" for name, share in sorted(shares.items()))
    said = f"{count} pairs are left out" if count else "No pair is left out"
    return (
        f"<p>{said} for annotators who rarely order pairs as most others do. "
        f"Pairs that they order so, by annotator: {by_annotator}.</p>"
    )


def _disputed_html(reward: dict[str, float]) -> str:
    """What `least_pair_agreement` has left out of the reward model's pairs; empty where it was not set."""
    if "num_pairs/dropped_disputed" not in reward:
        return ""
    kept = int(reward["num_pairs/train"] + reward["num_pairs/held_out"])
    return (
        f"<p>{int(reward['num_pairs/dropped_disputed'])} pairs of responses are left out because too few of their annotators agree on the order; {kept} are kept. "
        "Held-out pairs are of the kept ones, and so easier than what people disagree on.</p>"
    )


def tie_back_html(history: History, pong_history: History) -> str:
    """The same diagnostics of the language model's PPO and of Pong's, over the course of each; empty without a Pong run."""
    figures = []
    for name, label, note, unit in _SHARED:
        curves = [
            _over_the_course(item) for item in (curve(history, name), curve(pong_history, name)) if item
        ]
        if len(curves) == 2:
            chart = line_chart(curves, label, "% of the training", unit)
            figures.append(f"<figure><figcaption><b>{label}</b> {note}</figcaption>{chart}</figure>")
    if not figures:
        return ""
    return (
        "<h2>The tie-back: one PPO, two tasks</h2>"
        "<p>The code that moves a paddle from pixels is the code that tuned this language model, so its figures mean the same in "
        'both: <span class="ppo">— the language model</span>, <span class="sft">- - Pong</span>.</p>'
        f'<div class="charts">{"".join(figures)}</div>'
    )


def _over_the_course(item: Curve) -> Curve:
    return Curve(item.name, tuple(100 * step / item.steps[-1] for step in item.steps), item.values)


def _chart(history: History, name: str, label: str, note: str, x_label: str, y_label: str) -> str:
    """Chart of `name` and of its held-out twin `eval_<name>`, whichever were logged; empty where neither was."""
    train, held_out = curve(history, name), curve(history, f"eval_{name}")
    curves = [item for item in (train, held_out) if item]
    if not curves:
        return ""
    if train and held_out:
        note += ' <span class="ppo">— training</span> <span class="sft">- - held-out</span>'
    elif held_out:
        note += " held-out"
    chart = line_chart(curves, label, x_label, y_label)
    return f"<figure><figcaption><b>{escape(label)}</b> {note}</figcaption>{chart}</figure>"
