"""docs/options.md names every setting of PPO that is ours, with its default, and tests that are there."""

import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from tieback.pipeline.trainer import PPOConfig

ROOT = Path(__file__).parents[1]


def own_settings() -> dict[str, Any]:
    """Default of each setting that TrainingArguments has not, or has with another default."""
    theirs = {item.name: (item.default, item.default_factory) for item in fields(TrainingArguments)}
    own = {
        item.name: item.default_factory() if item.default is MISSING else item.default
        for item in fields(PPOConfig)
        if theirs.get(item.name) != (item.default, item.default_factory)
    }
    # No choice, as PPO would not work with the other value; their reasons are in setting_checks.py.
    return {
        name: value
        for name, value in own.items()
        if name not in ("dataloader_drop_last", "remove_unused_columns")
    }


def rows() -> list[list[str]]:
    lines = (ROOT / "docs" / "options.md").read_text(encoding="utf-8").splitlines()
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")
    ]
    assert all(len(row) == 5 for row in cells)
    return cells


def test_every_setting_of_ours_has_its_row_with_its_default() -> None:
    written = {row[0].strip("`"): row[1] for row in rows()}
    shown = {None: "not set", True: "true", False: "false"}
    assert written == {
        name: shown.get(value, str(value)) if isinstance(value, bool | None) else str(value)
        for name, value in own_settings().items()
    }
    assert len(written) == len(rows()), "a setting has two rows"


def test_every_row_names_a_test_that_is_there_and_knows_the_setting() -> None:
    for name, _, _, advice, test in rows():
        assert re.fullmatch(r"test_\w+\.py", test), name
        text = (ROOT / "tests" / test).read_text(encoding="utf-8")
        assert name.strip("`") in text, f"{test} does not mention {name}"
        assert advice.endswith(".")
