"""The page of an evaluation: one HTML file that needs neither network nor JavaScript, in light and in dark.

Everything that a model or a person wrote goes through `examples.escape`.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.report.curves import curve, line_chart, logged_names
from pipeline.report.examples import drawn_at_random, escape, number, pair_html, worst_for_ppo

_STYLE = Path(__file__).with_name("style.css")

# (name in metrics.json, what it is, decimals, whether it is a fraction to show in per cent)
_COMPARED = (
    ("gold_score", "Gold score", "mean score of the judge that decides the win rate", 2, False),
    ("reward_score", "Reward-model score", "mean score of the reward model", 2, False),
    ("response_length", "Response length", "tokens", 1, False),
    ("truncated_fraction", "Cut off", "responses that reached the length limit without an end", 1, True),
    (
        "distinct_2",
        "Distinct word pairs",
        "over all word pairs; low where responses repeat themselves",
        1,
        True,
    ),
    (
        "distinct_responses",
        "Different responses",
        "over all responses; low where one phrase answers all",
        1,
        True,
    ),
)
_PPO_CURVES = (
    ("reward/mean", "Reward", "mean score, penalties included"),
    ("kl/ref", "KL to the reference", "nats a completion"),
    ("policy/entropy", "Entropy", "of the policy, nats a token"),
    ("policy/clip_fraction", "Clip fraction", "share of tokens"),
    ("value/loss", "Value loss", "of the critic"),
    ("completions/mean_length", "Completion length", "tokens"),
)


@dataclass(frozen=True)
class Report:
    """What the page shows.

    Args:
        metrics: the evaluation's metrics.json.
        pairs: the rows of samples.jsonl.
        judge: `gold_score` or `reward_score`: the score of `pairs` that decides a win.
        judge_name: that judge in words, e.g. the names of the gold functions.
        prompts_name: where the prompts come from, in words.
        histories: `log_history` of the trainings, by stage (`sft`, `reward`, `ppo`).
        stage_metrics: metrics.json of the earlier stages, by stage.
        reward_figures: PNG files of the reward-model report.
        settings: what the recipe and the command line of each stage set, by stage.
        versions: library versions.
        num_examples: pairs to draw at random.
        seed: seed of that draw.
    """

    metrics: dict[str, float]
    pairs: Sequence[dict[str, Any]]
    judge: str
    judge_name: str
    prompts_name: str
    histories: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    stage_metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    reward_figures: Sequence[Path] = ()
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    num_examples: int = 8
    seed: int = 0


def render(report: Report) -> str:
    """Return the whole page."""
    title = _verdict(report.metrics)
    sections = (
        _headline(report, title),
        _examples(report),
        _ppo_curves(report.histories.get("ppo", [])),
        _earlier_stages(report),
        _settings(report),
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_STYLE.read_text(encoding='utf-8')}</style>\n</head>\n"
        f"<body><main>\n{''.join(sections)}</main></body>\n</html>\n"
    )


def _percent(value: float, decimals: int = 1) -> str:
    return f"{100 * value:.{decimals}f}%"


def _verdict(metrics: dict[str, float]) -> str:
    if metrics["win_rate/ci95_low"] > 0.5:
        return "PPO’s responses are preferred to SFT’s"
    if metrics["win_rate/ci95_high"] < 0.5:
        return "SFT’s responses are preferred to PPO’s"
    return "No clear preference between PPO and SFT"


def _headline(report: Report, title: str) -> str:
    metrics = report.metrics
    rate, low, high = (metrics[f"win_rate/{name}"] for name in ("ppo_vs_sft", "ci95_low", "ci95_high"))
    count = int(metrics["num_prompts"])
    caveat = (
        '<p class="note">Every pair had the same outcome, so resampling cannot vary it: the interval has no width, '
        f"although with {count} prompts a rate that differs by up to about 3/{count} would often look the same.</p>"
        if low == high
        else ""
    )
    agreement = (
        f" By the reward model’s own score, PPO wins {_percent(metrics['win_rate/reward_model'])}."
        if "win_rate/reward_model" in metrics and report.judge != "reward_score"
        else ""
    )
    return f"""<h1>{escape(title)}</h1>
<p class="lead">PPO against the SFT model that it started from, on {count} held-out prompts
({escape(report.prompts_name)}), one sampled response each.</p>
<div class="hero">
<div><div class="big">{_percent(rate)}</div><div class="note">win rate of PPO</div>
<div class="note">95% interval {_percent(low)} to {_percent(high)}</div></div>
<div class="scale">
<div class="track"><div class="band" style="left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"></div>
<div class="even"></div><div class="dot" style="left:{100 * rate:.2f}%"></div></div>
<div class="ends"><span>SFT always better</span><span>even</span><span>PPO always better</span></div>
</div></div>
<p>The response with the higher score wins its prompt, a tie counts half; the judge is {escape(report.judge_name)}.{agreement}
The interval is a bootstrap over prompts.</p>
{caveat}{_score_table(metrics)}"""


def _score_table(metrics: dict[str, float]) -> str:
    rows = []
    for name, label, note, decimals, is_fraction in _COMPARED:
        if f"{name}/ppo" not in metrics:
            continue
        sft, ppo = metrics[f"{name}/sft"], metrics[f"{name}/ppo"]
        if is_fraction:
            cells = (_percent(sft), _percent(ppo), number(100 * (ppo - sft), 1, signed=True) + " pts")
        else:
            cells = (number(sft, decimals), number(ppo, decimals), number(ppo - sft, decimals, signed=True))
        rows.append(_score_row(label, note, cells))
    kl = number(metrics["kl/ppo_vs_sft"], 2)
    rows.append(_score_row("KL to SFT", "nats a response: how far PPO has moved", ("", kl, "")))
    return (
        '<div class="scroll"><table><thead><tr><th scope="col">mean over prompts</th><th scope="col" class="sft">SFT'
        '</th><th scope="col" class="ppo">PPO</th><th scope="col">change</th></tr></thead><tbody>'
        f"{''.join(rows)}</tbody></table></div>"
    )


def _score_row(label: str, note: str, cells: tuple[str, str, str]) -> str:
    return f"<tr><td>{label}<small>{note}</small></td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _examples(report: Report) -> str:
    drawn = drawn_at_random(report.pairs, report.num_examples, report.seed)
    parts = [
        "<h2>Responses side by side</h2>",
        f'<p class="note">{len(drawn)} of {len(report.pairs)} prompts, drawn at random. '
        "<code>samples.jsonl</code> has them all.</p>",
        *(pair_html(pair, report.judge) for pair in drawn),
    ]
    worst = worst_for_ppo(report.pairs, report.judge, count=min(3, report.num_examples))
    if worst:
        parts += ["<h3>Where PPO lost by most</h3>", *(pair_html(pair, report.judge) for pair in worst)]
    return "".join(parts)


def _ppo_curves(history: list[dict[str, Any]]) -> str:
    figures = [_chart(history, name, label, note, "iteration") for name, label, note in _PPO_CURVES]
    shown = {name for name, _, _ in _PPO_CURVES}
    rest = sorted({name.removeprefix("eval_") for name in logged_names(history)} - shown)
    more = [chart for chart in (_chart(history, name, name, "", "iteration") for name in rest) if chart]
    if not any(figures) and not more:
        return '<h2>PPO training</h2><p class="note">No training log was found beside the PPO model.</p>'
    others = (
        f'<details><summary>All other logged figures ({len(more)})</summary><div class="charts">{"".join(more)}</div>'
        "</details>"
        if more
        else ""
    )
    return f'<h2>PPO training</h2><div class="charts">{"".join(figures)}</div>{others}'


def _chart(history: list[dict[str, Any]], name: str, label: str, note: str, x_label: str) -> str:
    """Chart of `name` and of its held-out twin `eval_<name>`, whichever were logged; empty where neither was."""
    train, held_out = curve(history, name), curve(history, f"eval_{name}")
    curves = [item for item in (train, held_out) if item]
    if not curves:
        return ""
    if train and held_out:
        note += ' <span class="ppo">— training</span> <span class="sft">- - held-out</span>'
    elif held_out:
        note += " held-out"
    return f"<figure><figcaption><b>{escape(label)}</b> {note}</figcaption>{line_chart(curves, x_label)}</figure>"


def _earlier_stages(report: Report) -> str:
    charts = "".join(
        _chart(report.histories.get(stage, []), "loss", label, "", "step")
        for stage, label in (("sft", "SFT loss"), ("reward", "Reward-model loss"))
    )
    pictures = "".join(_picture(path) for path in report.reward_figures)
    tables = "".join(
        f"<h3><code>{escape(stage)}/metrics.json</code></h3>{_plain_table({k: f'{v:.4g}' for k, v in metrics.items()})}"
        for stage, metrics in report.stage_metrics.items()
    )
    if not (charts or pictures or tables):
        return ""
    details = f"<details><summary>Figures of the earlier stages</summary>{tables}</details>" if tables else ""
    return f'<h2>SFT and the reward model</h2><div class="charts">{charts}{pictures}</div>{details}'


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    name = escape(path.stem.replace("_", " "))
    return (
        f'<figure><figcaption><b>Reward model: {name}</b></figcaption><img alt="Reward model: {name}" '
        f'src="data:image/png;base64,{data}"></figure>'
    )


def _settings(report: Report) -> str:
    recipes = "".join(
        f"<details><summary>Recipe of {escape(stage)}</summary>{_plain_table(settings)}</details>"
        for stage, settings in report.settings.items()
        if settings
    )
    return (
        f"<h2>Recipe and versions</h2>{recipes}"
        f"<details><summary>Library versions</summary>{_plain_table(report.versions)}</details>"
    )


def _plain_table(values: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(k)}</code></td><td>{escape(v)}</td></tr>" for k, v in values.items()
    )
    return f'<div class="scroll"><table class="plain"><tbody>{rows}</tbody></table></div>'
