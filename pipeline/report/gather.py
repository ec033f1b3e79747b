"""Read the files that the page shows: those of the evaluation, of the stages before it, and people's comparisons."""

import json
import os
from pathlib import Path
from typing import Any

from tieback.cli.errors import UsageError
from tieback.pipeline.report.curves import read_events, read_log
from tieback.pipeline.report.human import human_figures
from tieback.pipeline.report.page import Report, render
from tieback.pipeline.scorers import folder_reward_name
from tieback.reward_model.report import read_calibration

STAGES = ("sft", "collect", "reward", "ppo")
_FACTS = "report.json"
_PATHS = ("compare", "pong")


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Write report.json: what the page says and no other file holds.

    Args:
        folder: of the evaluation.
        facts: `judge`, `judge_name`, `prompts_name`, `frontier`, `versions`, `num_examples`, `num_resamples`, `seed`, and
            paths: `stages` (by name), `rounds` (evaluations of earlier rounds), `compare` (log of people's comparisons)
            and `pong` (folder). Paths are kept relative to the folder, so that a run may be moved as a whole.
    """
    kept = {
        **facts,
        **{name: _relative(facts[name], folder) for name in _PATHS},
        "stages": {stage: _relative(path, folder) for stage, path in facts["stages"].items()},
        "rounds": [_relative(path, folder) for path in facts["rounds"]],
    }
    (folder / _FACTS).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def _relative(path: str, folder: Path) -> str:
    return os.path.relpath(path, folder)


def write_report(folder: Path) -> Path:
    """Write report.html of the evaluation in a folder, and return its path."""
    path = folder / "report.html"
    path.write_text(render(gather(folder)), encoding="utf-8")
    return path


def gather(folder: Path) -> Report:
    """Read what the page shows.

    Args:
        folder: of an evaluation, with metrics.json, samples.jsonl, settings.json and report.json.

    Raises:
        UsageError: one of them is missing.
    """
    missing = [name for name in ("metrics.json", "samples.jsonl", _FACTS) if not (folder / name).is_file()]
    if missing:
        raise UsageError(
            f"{folder} holds no finished evaluation ({', '.join(missing)} missing): run `make evaluate` first."
        )
    facts = _read_json(folder / _FACTS)
    stages = {stage: folder / path for stage, path in facts["stages"].items()}
    pairs = [json.loads(line) for line in (folder / "samples.jsonl").read_text("utf-8").splitlines()]
    rounds = [folder / path / "metrics.json" for path in facts["rounds"]]
    metrics = _read_json(folder / "metrics.json")
    return Report(
        metrics=metrics,
        pairs=pairs,
        judge=facts["judge"],
        judge_name=facts["judge_name"],
        prompts_name=facts["prompts_name"],
        human=human_figures(folder / facts["compare"], pairs, facts["num_resamples"], facts["seed"]),
        rounds=[*(_read_json(path) for path in rounds if path.is_file()), metrics],
        histories={stage: read_log(path) for stage, path in stages.items()},
        pong_history=read_events(folder / facts["pong"]),
        frontier=facts["frontier"],
        reward_name=folder_reward_name(stages["reward"]),
        ranked_by=_ranked_by(stages),
        stage_metrics={
            stage: _read_json(path / "metrics.json")
            for stage, path in stages.items()
            if (path / "metrics.json").is_file()
        },
        calibration=read_calibration(stages["reward"]),
        settings={stage: _read_settings(path) for stage, path in {**stages, "evaluate": folder}.items()},
        versions=facts["versions"],
        num_examples=facts["num_examples"],
        seed=facts["seed"],
    )


def _ranked_by(stages: dict[str, Path]) -> str:
    """Who ranked the pairs that the reward model learnt from, as far as the stages' settings say."""
    if _read_settings(stages["reward"]).get("dataset_name") is not None:
        return "the ranking in the data"
    annotator = str(_read_settings(stages["collect"]).get("annotator"))
    return {"simulated": "the simulated annotator", "none": "people"}.get(annotator, "the ranking")


def _read_settings(folder: Path) -> dict[str, Any]:
    """What the recipe and the command line of a stage set; nothing where the stage left no settings.json."""
    path = folder / "settings.json"
    return _read_json(path) if path.is_file() else {}


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
