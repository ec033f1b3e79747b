"""Several runs on one page: their figures in one table, their curves on common axes, and the settings they differ in."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tieback.cli.errors import UsageError
from tieback.pipeline.report.curves import MAX_CURVES, curve, line_chart
from tieback.pipeline.report.gather import gather
from tieback.pipeline.report.html_parts import escape
from tieback.pipeline.report.page import Report, document

_FIGURES = (
    ("win_rate/ppo_vs_sft", "Win rate of PPO against SFT", 3),
    ("win_rate/ci95_low", "… its 95% interval from", 3),
    ("win_rate/ci95_high", "… to", 3),
    ("human/win_rate", "Win rate by people’s judgement", 3),
    ("gold_score/sft", "Gold score of SFT", 3),
    ("gold_score/ppo", "Gold score of PPO", 3),
    ("reward_score/ppo", "Reward-model score of PPO", 2),
    ("kl/ppo_vs_sft", "KL to SFT (nats)", 2),
    ("response_length/ppo", "Response length of PPO (tokens)", 1),
    ("truncated_fraction/ppo", "Cut off", 3),
    ("distinct_2/ppo", "Distinct word pairs", 3),
    ("repeated_4/ppo", "Repeated phrases", 3),
    ("num_prompts", "Prompts", 0),
)
_CURVES = (
    ("reward/mean", "Reward", "mean raw score, before normalising and penalties", "score"),
    ("kl/ref", "KL to the reference", "nats a completion", "nats"),
    ("policy/entropy", "Entropy", "of the policy, nats a token", "nats"),
    ("completions/mean_length", "Completion length", "tokens", "tokens"),
)


def evaluation_folder(run: Path) -> Path:
    """Folder of a run's newest evaluation: that of its last round; or `run` itself, where it is such a folder.

    Raises:
        UsageError: nothing there has been evaluated.
    """
    if (run / "samples.jsonl").is_file():
        return run
    rounds = [path.parent for path in run.glob("round*/evaluate/metrics.json")]
    numbered = {int(folder.parent.name.removeprefix("round")): folder for folder in rounds}
    if (run / "evaluate" / "metrics.json").is_file():
        numbered[1] = run / "evaluate"
    if not numbered:
        raise UsageError(f"{run} holds no evaluation: run `make evaluate RUN={run}` first.")
    return numbered[max(numbered)]


def render_comparison(runs: Sequence[Path]) -> str:
    """Return the whole page.

    Raises:
        UsageError: a run has not been evaluated, or there are too many to tell their curves apart.
    """
    if len(runs) > MAX_CURVES:
        raise UsageError(f"At most {MAX_CURVES} runs can be told apart on one page; {len(runs)} are named.")
    reports = [gather(evaluation_folder(run)) for run in runs]
    names = [escape(run) for run in runs]
    title = f"{len(runs)} runs compared"
    keys = "".join(
        f'<li><span class="key" style="background:var(--series-{place})"></span>{name}</li>'
        for place, name in enumerate(names, start=1)
    )
    return document(
        title,
        f'<h1>{title}</h1><ul class="keys">{keys}</ul>{_table(names, reports)}'
        f"<h2>PPO training</h2>{_charts(runs, reports)}<h2>Where the recipes differ</h2>{_differences(names, reports)}",
    )


def _table(names: Sequence[str], reports: Sequence[Report]) -> str:
    figures = [report.metrics | report.human for report in reports]
    rows = "".join(
        f"<tr><td>{label}</td>{''.join(_cell(own, name, decimals) for own in figures)}</tr>"
        for name, label, decimals in _FIGURES
        if any(name in own for own in figures)
    )
    return _scrolling_table(names, rows)


def _cell(figures: dict[str, float], name: str, decimals: int) -> str:
    return f"<td>{figures[name]:.{decimals}f}</td>" if name in figures else "<td>–</td>"


def _scrolling_table(names: Sequence[str], rows: str) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    return (
        f'<div class="scroll"><table><thead><tr><th scope="col"></th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _charts(runs: Sequence[Path], reports: Sequence[Report]) -> str:
    figures = []
    for name, label, note, unit in _CURVES:
        curves = [
            replace(item, name=str(run)) if item else None
            for run, report in zip(runs, reports, strict=True)
            for item in [curve(report.histories.get("ppo", []), name)]
        ]
        if any(curves):
            chart = line_chart(curves, label, "iteration", unit)
            figures.append(f"<figure><figcaption><b>{label}</b> {note}</figcaption>{chart}</figure>")
    if not figures:
        return '<p class="note">No training log was found beside the PPO models.</p>'
    return f'<div class="charts">{"".join(figures)}</div>'


def _differences(names: Sequence[str], reports: Sequence[Report]) -> str:
    settings: list[dict[str, Any]] = [
        {f"{stage}: {name}": value for stage, own in report.settings.items() for name, value in own.items()}
        for report in reports
    ]
    known = dict.fromkeys(name for own in settings for name in own)
    differing = [
        name
        for name in known
        # Folders and the weights of models differ from run to run by themselves.
        if not name.endswith((": run_dir", ": output_dir"))
        and ": weights of " not in name
        and any(own.get(name) != settings[0].get(name) for own in settings)
    ]
    if not differing:
        return '<p class="note">They do not: every stage ran with the same settings.</p>'
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code></td>"
        + "".join(f"<td>{escape(own.get(name, '–'))}</td>" for own in settings)
        + "</tr>"
        for name in differing
    )
    return _scrolling_table(names, rows)
