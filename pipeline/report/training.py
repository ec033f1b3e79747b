"""The page's charts: PPO's curves, reward against KL, the stages before it, and the same diagnostics of Pong."""

import base64
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tieback.pipeline.report.curves import Curve, curve, line_chart, logged_names
from tieback.pipeline.report.html_parts import escape, number, plain_table

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


def reward_against_kl_html(history: History, frontier: Sequence[dict[str, float]], reward_name: str) -> str:
    """What each nat of KL to the reference bought: PPO's path, and best-of-n of SFT where it was computed.

    Both are raw scores of one reward model. Where PPO's log has none of that model (it learnt from others), its own
    weighted score is drawn, and best-of-n, which is on another scale, is left to the table.

    Args:
        history: PPO's log.
        frontier: see `Report`.
        reward_name: under which PPO logs the reward model that best-of-n chooses by.
    """
    is_same_model = f"reward/{reward_name}" in logged_names(history)
    score = f"reward/{reward_name}" if is_same_model else "reward/mean"
    by_step: dict[float, dict[str, float]] = {}
    for name in ("kl/ref", score):
        item = curve(history, name)
        for step, value in zip(item.steps, item.values, strict=True) if item else ():
            by_step.setdefault(step, {})[name] = value
    points = [(at["kl/ref"], at[score]) for _, at in sorted(by_step.items()) if len(at) == 2]
    if len(points) < 2:
        return ""
    curves = [Curve("PPO", *zip(*points, strict=True))]
    note = '<span class="ppo">— PPO, iteration by iteration</span>'
    table = ""
    if len(frontier) > 1:
        if is_same_model:
            xs, ys = zip(*((point["kl"], point["reward_score"]) for point in frontier), strict=True)
            curves.append(Curve("best of n", xs, ys))
            note += f' <span class="sft">- - best of 1 to {int(frontier[-1]["n"])} responses of SFT, chosen by the reward model</span>'
        table = _frontier_table(frontier)
    chart = line_chart(
        curves, "Reward against KL", "KL to the reference (nats)", "raw score", size=(5.4, 2.6)
    )
    return (
        '<h2>Reward against KL</h2><p class="note">A score bought with much KL is the more likely to be the reward model’s '
        "weakness rather than a better answer. The score is the raw one, as the evaluation gives it. Best-of-n is what choosing alone reaches: no training, but n responses for one."
        f'</p><div class="charts wide"><figure><figcaption>{note}</figcaption>{chart}</figure>{table}</div>'
    )


def _frontier_table(frontier: Sequence[dict[str, float]]) -> str:
    names = [name for name in ("kl", "reward_score", "gold_score") if name in frontier[0]]
    labels = {"kl": "KL", "reward_score": "reward model", "gold_score": "gold"}
    head = "".join(f'<th scope="col">{labels[name]}</th>' for name in names)
    rows = "".join(
        f"<tr><td>best of {int(point['n'])}</td>{''.join(f'<td>{number(point[name], 2)}</td>' for name in names)}</tr>"
        for point in frontier
    )
    return f'<div class="scroll"><table><thead><tr><th scope="col">SFT</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def earlier_stages_html(
    histories: dict[str, list[dict[str, Any]]],
    reward_figures: Sequence[Path],
    stage_metrics: dict[str, dict[str, float]],
    ranked_by: str,
) -> str:
    """Losses of SFT and of the reward model, the pictures of its report, and every stage's figures.

    `ranked_by` says in words who ranked the pairs that the reward model learnt from.
    """
    charts = "".join(
        _chart(histories.get(stage, []), "loss", label, "", "step", "nats")
        for stage, label in (("sft", "SFT loss"), ("reward", "Reward-model loss"))
    )
    pictures = "".join(_picture(path) for path in reward_figures)
    reward = stage_metrics.get("reward", {})
    bias = (
        f"<p>On held-out pairs the reward model prefers what {escape(ranked_by)} preferred in "
        f"{100 * reward['accuracy/held_out']:.1f}% of them; always choosing the longer response would be right in {100 * reward['accuracy/length_only']:.1f}%.</p>"
        if {"accuracy/held_out", "accuracy/length_only"} <= reward.keys()
        else ""
    )
    tables = "".join(
        f"<h3><code>{escape(stage)}/metrics.json</code></h3>{plain_table({k: f'{v:.4g}' for k, v in metrics.items()})}"
        for stage, metrics in stage_metrics.items()
    )
    if not (charts or pictures or tables):
        return ""
    details = f"<details><summary>Figures of the earlier stages</summary>{tables}</details>" if tables else ""
    return f'<h2>SFT and the reward model</h2>{bias}<div class="charts">{charts}{pictures}</div>{details}'


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


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    name = escape(path.stem.replace("_", " "))
    return (
        f'<figure><figcaption><b>Reward model: {name}</b></figcaption><img alt="Reward model: {name}" '
        f'src="data:image/png;base64,{data}"></figure>'
    )
