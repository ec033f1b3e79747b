"""The page of an evaluation: one HTML file that needs no network, in light and in dark.

Everything that a model or a person wrote goes through `examples.escape`. A small script sorts the examples; without it
the page shows those drawn at random.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tieback.pipeline.report.costs import costs_html
from tieback.pipeline.report.examples import examples_html
from tieback.pipeline.report.frontier import reward_against_kl_html
from tieback.pipeline.report.groups import groups_html
from tieback.pipeline.report.html_parts import escape, number, plain_table
from tieback.pipeline.report.judging import judged_html
from tieback.pipeline.report.lengths import lengths_html
from tieback.pipeline.report.training import (
    earlier_stages_html,
    ppo_html,
    tie_back_html,
)
from tieback.reward_model.report import CalibrationBin

_STYLE = Path(__file__).with_name("style.css")
_SCRIPT = Path(__file__).with_name("sort.js")

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
    ("repeated_4", "Repeated phrases", "four words that stood in the same response already", 1, True),
    (
        "reward_length_correlation",
        "Reward and length",
        "correlation of the reward model’s score with the length: near 1, length is what it likes",
        2,
        False,
    ),
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
        human: figures of people's comparisons, as `human.human_figures` gives them; empty where there are none.
        rounds: metrics.json of each round's evaluation, this one's last.
        frontier: best-of-n of SFT, as evaluate computes it; empty where it did not.
        reward_name: under which PPO logs the reward model (`reward/<reward_name>`).
        ranked_by: who ranked the pairs that the reward model learnt from, in words.
        pong_history: as `histories`, of a Pong run; empty where there is none.
        histories: `log_history` of the trainings, by stage (`sft`, `reward`, `ppo`).
        stage_metrics: metrics.json of the earlier stages, by stage.
        calibration: of the reward model; empty where it was not kept.
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
    human: dict[str, float] = field(default_factory=dict)
    rounds: Sequence[dict[str, float]] = ()
    frontier: Sequence[dict[str, float]] = ()
    reward_name: str = "reward_model"
    ranked_by: str = "the ranking"
    pong_history: Sequence[dict[str, Any]] = ()
    histories: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    stage_metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    calibration: Sequence[CalibrationBin] = ()
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    num_examples: int = 8
    seed: int = 0


def render(report: Report) -> str:
    """Return the whole page."""
    title = _verdict(report.metrics)
    ppo_history = report.histories.get("ppo", [])
    sections = (
        _headline(report, title),
        _human(report.human),
        _rounds(report.rounds),
        examples_html(report.pairs, report.judge, report.num_examples, report.seed),
        groups_html(report.pairs, report.judge, report.seed),
        lengths_html(report.pairs),
        ppo_html(ppo_history),
        judged_html(ppo_history),
        reward_against_kl_html(
            ppo_history, report.frontier, report.reward_name, report.metrics, _judged_by_gold(report.settings)
        ),
        earlier_stages_html(report.histories, report.calibration, report.stage_metrics, report.ranked_by),
        costs_html(report.stage_metrics | {"evaluate": report.metrics}),
        tie_back_html(ppo_history, report.pong_history),
        _settings(report),
    )
    script = f"<script>\n{_SCRIPT.read_text(encoding='utf-8')}</script>"
    return document(title, "".join(sections), script)


def _judged_by_gold(settings: dict[str, dict[str, Any]]) -> bool:
    judges = settings.get("ppo", {}).get("judge_funcs")
    return bool(judges) and judges == settings.get("evaluate", {}).get("gold_funcs")


def document(title: str, body: str, script: str = "") -> str:
    """A whole page around `body`, which is HTML; `title` is text."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_STYLE.read_text(encoding='utf-8')}</style>\n</head>\n"
        f"<body><main>\n{body}</main>\n{script}</body>\n</html>\n"
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
{_hero(rate, low, high, "win rate of PPO")}
<p>The response with the higher score wins its prompt, a tie counts half; the judge is {escape(report.judge_name)}.{agreement}
The interval is a bootstrap over prompts.</p>
{caveat}{_score_table(metrics)}"""


def _hero(rate: float, low: float, high: float, label: str) -> str:
    return f"""<div class="hero">
<div><div class="big">{_percent(rate)}</div><div class="note">{label}</div>
<div class="note">95% interval {_percent(low)} to {_percent(high)}</div></div>
<div class="scale">
<div class="track"><div class="band" style="left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"></div>
<div class="even"></div><div class="dot" style="left:{100 * rate:.2f}%"></div></div>
<div class="ends"><span>SFT always better</span><span>even</span><span>PPO always better</span></div>
</div></div>"""


def _human(figures: dict[str, float]) -> str:
    if not figures:
        return ""
    rate, low, high = (figures[f"human/{name}"] for name in ("win_rate", "ci95_low", "ci95_high"))
    agreement = (
        f" Where both people and the judge decide, they agree on {_percent(figures['human/agreement_with_judge'])}."
        if "human/agreement_with_judge" in figures
        else ""
    )
    return f"""<h2>By people’s judgement</h2>
{_hero(rate, low, high, "win rate of PPO, by people")}
<p>{int(figures["human/num_judgements"])} judgements of {int(figures["human/num_prompts"])} of these prompts, made without
knowing which response is whose; a tie counts half.{agreement}</p>"""


def _rounds(rounds: Sequence[dict[str, float]]) -> str:
    if len(rounds) < 2:
        return ""
    columns = (
        ("gold_score/ppo", "gold score", 3),
        ("reward_score/ppo", "reward-model score", 2),
        ("kl/ppo_vs_sft", "KL to SFT", 2),
        ("win_rate/ppo_vs_sft", "win rate against SFT", 3),
    )
    shown = [column for column in columns if all(column[0] in metrics for metrics in rounds)]
    head = "".join(f'<th scope="col">{label}</th>' for _, label, _ in shown)
    rows = "".join(
        f"<tr><td>round {place}</td>"
        + "".join(f"<td>{number(metrics[name], decimals)}</td>" for name, _, decimals in shown)
        + "</tr>"
        for place, metrics in enumerate(rounds, start=1)
    )
    return (
        '<h2>Round by round</h2><p class="note">In each round the newest policy answers, the reward model is fitted again to all '
        "rankings so far, and PPO starts again from the SFT model. Each round’s reward model has a scale of its own.</p>"
        f'<div class="scroll"><table><thead><tr><th scope="col">PPO after</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


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


def _settings(report: Report) -> str:
    recipes = "".join(
        f"<details><summary>Recipe of {escape(stage)}</summary>{plain_table(settings)}</details>"
        for stage, settings in report.settings.items()
        if settings
    )
    return (
        f"<h2>Recipe and versions</h2>{recipes}"
        f"<details><summary>Library versions</summary>{plain_table(report.versions)}</details>"
    )
