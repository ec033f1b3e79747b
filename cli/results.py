"""Results of a program in its folder: JSON files written whole, metrics.json, and a table of it on the screen."""

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

METRICS = "metrics.json"


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader, or a kill, finds the old file or the new one and nothing between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(path)


def write_metrics(folder: str | Path, metrics: Mapping[str, float]) -> None:
    """Write `metrics.json`: flat, numbers only, named as in docs/glossary.md. It says that the program came to its end.

    Raises:
        ValueError: a value is not a finite number.
    """
    for name, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{METRICS} holds finite numbers only, but `{name}` is {value!r}.")
    write_json(Path(folder) / METRICS, dict(metrics))


def changed_settings(
    before: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str] = ()
) -> dict[str, str]:
    """Say of each setting that differs what it was and what it is, but for those in `free`; empty where none does."""
    return {
        name: f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in sorted((before.keys() | now.keys()) - set(free))
        if before.get(name) != now.get(name)
    }


def print_metrics(title: str, metrics: Mapping[str, float]) -> None:
    """Print the figures as a table."""
    table = Table("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{value:,.0f}" if value == int(value) else f"{value:.4g}")
    console = Console()
    console.print(title, soft_wrap=True)
    console.print(table)
