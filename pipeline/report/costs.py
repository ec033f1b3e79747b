"""What each stage has taken: time, tokens a second, memory."""

from collections.abc import Mapping

from tieback.pipeline.report.html_parts import escape

_COLUMNS = (
    (("train/seconds", "collect/seconds", "evaluate/seconds"), "time", "{:,.0f} s"),
    (("train/seconds_to_first_step",), "of it until the first step", "{:,.0f} s"),
    (("tokens_per_second",), "tokens sampled a second", "{:,.0f}"),
    (("memory/peak",), "most memory of a process", "{:,.0f} MiB"),
)


def costs_html(stage_metrics: Mapping[str, Mapping[str, float]]) -> str:
    """A table of the stages' times and memory, as their metrics.json have them; empty where none has any."""
    rows = []
    for stage, metrics in stage_metrics.items():
        cells = [
            next((shape.format(metrics[name]) for name in names if name in metrics), "")
            for names, _, shape in _COLUMNS
        ]
        if any(cells):
            rows.append(f"<tr><td>{escape(stage)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{label}</th>' for _, label, _ in _COLUMNS)
    return (
        f'<h2>What it took</h2><div class="scroll"><table><thead><tr><th scope="col">stage</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
