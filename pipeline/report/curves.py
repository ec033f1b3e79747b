"""Figures of the report as inline SVG: they take their colours from the page, so they follow light and dark."""

import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tieback.pipeline.report.html_parts import escape

# Matplotlib wants colours of its own; these stand-ins become CSS variables of the page.
MAX_CURVES = 6
_INK, _GRID, _SERIES = "#010203", "#040506", [f"#07080{number}" for number in range(1, MAX_CURVES + 1)]
_CSS_COLOURS = {
    _INK: "var(--muted)",
    _GRID: "var(--line)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES, start=1)},
}
_MAX_POINTS = 400


@dataclass(frozen=True)
class Curve:
    """One logged figure over the steps of a training: `steps` and `values` have equal length."""

    name: str
    steps: tuple[float, ...]
    values: tuple[float, ...]


def read_log(stage_dir: Path) -> list[dict[str, Any]]:
    """Return `log_history` of the training in `stage_dir`, or of its newest checkpoint; empty where there is none."""
    candidates = [stage_dir / "trainer_state.json", *_checkpoints_newest_first(stage_dir)]
    for path in candidates:
        if path.is_file():
            history = json.loads(path.read_text(encoding="utf-8")).get("log_history", [])
            return [entry for entry in history if isinstance(entry, dict)]
    return []


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Return the scalars that a run wrote for TensorBoard in `folder` or below it, as `read_log` would.

    Of several runs, the one whose events are newest; empty where there is none.
    """
    files = sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime)
    if not files:
        return []
    events = EventAccumulator(str(files[-1].parent), size_guidance={"scalars": 0, "tensors": 1})
    events.Reload()
    by_step: dict[int, dict[str, Any]] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            by_step.setdefault(event.step, {"step": event.step})[name] = event.value
    return [by_step[step] for step in sorted(by_step)]


def _checkpoints_newest_first(stage_dir: Path) -> list[Path]:
    numbered = [
        (int(folder.name.removeprefix("checkpoint-")), folder)
        for folder in stage_dir.glob("checkpoint-*")
        if folder.name.removeprefix("checkpoint-").isdigit()
    ]
    return [folder / "trainer_state.json" for _, folder in sorted(numbered, reverse=True)]


def curve(history: Sequence[dict[str, Any]], name: str) -> Curve | None:
    """Return the finite values logged under `name`, in order; None where there are fewer than two."""
    points = [
        (float(entry["step"]), float(entry[name]))
        for entry in history
        if _is_finite(entry.get(name)) and _is_finite(entry.get("step"))
    ]
    if len(points) < 2:
        return None
    steps, values = zip(*points, strict=True)
    return Curve(name, steps, values)


def logged_names(history: Sequence[dict[str, Any]]) -> list[str]:
    """Names of all figures in `history`, sorted, without its bookkeeping (step, epoch, times)."""
    bookkeeping = re.compile(r"^(step|epoch|total_flos|learning_rate$|num_.*)|.*(runtime|per_second)$")
    return sorted({name for entry in history for name in entry if not bookkeeping.match(name)})


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def line_chart(
    curves: Sequence[Curve | None],
    title: str,
    x_label: str,
    y_label: str,
    size: tuple[float, float] = (3.6, 1.9),
    points: Curve | None = None,
) -> str:
    """Draw up to `MAX_CURVES` curves on common axes and return an `<svg>` element, with a text for who cannot see it.

    Args:
        curves: in the page's colours, in their order (None leaves one out); the second of two is dashed.
        title: what is drawn; the page shows it beside the chart.
        x_label: unit of the steps.
        y_label: unit of the values.
        size: width and height in inches; the page scales the figure to its column.
        points: drawn as points in the first colour, the later the stronger.
    """
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        for number, (item, colour) in enumerate(zip(curves, _SERIES, strict=False)):
            if item is None:
                continue
            style = "--" if number == 1 and len(curves) == 2 else "-"
            stride = math.ceil(len(item.steps) / _MAX_POINTS)
            axes.plot(
                item.steps[::stride], item.values[::stride], linestyle=style, color=colour, linewidth=1.6
            )
        for place, (x, y) in enumerate(zip(points.steps, points.values, strict=True) if points else ()):
            # A line of no length with round ends: markers would stand in <defs>, which the page is without.
            shade = 0.25 + 0.75 * (place + 1) / len(points.steps) if points else 1.0
            axes.plot([x, x], [y, y], color=_SERIES[0], linewidth=5, solid_capstyle="round", alpha=shade)
        axes.set_xlabel(x_label, color=_INK, parse_math=False)
        axes.set_ylabel(y_label, color=_INK, parse_math=False)
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=_INK, length=0)
        axes.locator_params(nbins=5)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_GRID)
        svg = _inline_svg(figure)
    described = " ".join(_in_words(item, x_label) for item in (points, *curves) if item is not None)
    opening, rest = svg.split(">", 1)
    texts = f"<title>{escape(title)}</title><desc>{escape(described)}</desc>"
    return f'{opening} role="img">{texts}{rest}'


def _in_words(item: Curve, x_label: str) -> str:
    (first, last), (start, end) = ((numbers[0], numbers[-1]) for numbers in (item.steps, item.values))
    return (
        f"{item.name}: {start:.3g} at {x_label} {first:g}, {end:.3g} at {last:g}; between {min(item.values):.3g} and "
        f"{max(item.values):.3g}."
    )


def _inline_svg(figure: Figure) -> str:
    """Write `figure` as one `<svg>` element that can stand many times in a page.

    Removed: the document header, metadata and namespaces (addresses that a self-contained page need not have), ids and
    clip paths (random, so two reports of one run would differ), and the style sheet and fonts, which would compete
    with the page's.
    """
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<defs>.*?</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(xmlns(:\w+)?|version|id|clip-path)="[^"]*"', "", svg)
    svg = re.sub(r'^<svg width="[^"]*" height="[^"]*"', "<svg", svg)
    svg = re.sub(r"font-family: [^;]*; ", "", svg)
    for stand_in, css in _CSS_COLOURS.items():
        svg = svg.replace(stand_in, css)
    return svg
