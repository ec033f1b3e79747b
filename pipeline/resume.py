"""The checkpoint that a training stage goes on from when its command is given again."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState

from tieback.cli.errors import UsageError
from tieback.cli.results import METRICS, changed_settings, write_json

# What Trainer writes last: a checkpoint without it was torn by a kill.
TRAINER_STATE = "trainer_state.json"
SETTINGS = "settings.json"
# Settings that do not touch what is learnt.
_FREE = {
    *("run_dir", "output_dir", "resume_from_checkpoint", "config"),
    *("logging_dir", "logging_steps", "logging_strategy", "report_to", "run_name", "disable_tqdm"),
    *("save_strategy", "save_steps", "save_total_limit", "ddp_timeout"),
    *(
        "eval_strategy",
        "eval_steps",
        "per_device_eval_batch_size",
        "log_completions",
        "num_completions_to_print",
    ),
}


def whole_checkpoints(output_dir: str | Path, mark: str = TRAINER_STATE) -> list[Path]:
    """Folders `checkpoint-<n>` in which `mark`, the file that is written last, is there and whole, oldest first."""
    found = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if number and _is_whole(folder / mark):
            found.append((int(number[1]), folder))
    return [folder for _, folder in sorted(found)]


def _is_whole(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def checkpoint_to_resume(
    output_dir: str | Path, asked: str | None, settings: dict[str, Any], mark: str = TRAINER_STATE
) -> str | None:
    """Folder to go on from, and a clean output folder where the stage starts anew.

    Where nothing is asked, a stage that did not come to its end (its folder has checkpoints and no metrics.json) goes on
    from its newest whole checkpoint, if its settings are those that it was started with. Where it starts anew,
    checkpoints of the run before are removed, so that they are not taken for its own. The settings are written down
    for the next start. All processes must call.

    Args:
        output_dir: where the stage keeps its checkpoints.
        asked: `--resume_from_checkpoint`: a folder, "true" (the newest whole one), "false" (start anew), or None.
        settings: what the recipe and the command line set.
        mark: file of a checkpoint that is written last.

    Returns:
        The folder; None to start anew.

    Raises:
        UsageError: the folder asked for is missing or torn, or the settings are not those of the interrupted run.
    """
    state, folder = PartialState(), Path(output_dir)
    whole = whole_checkpoints(folder, mark)
    now = json.loads(json.dumps(settings, default=str))
    resume: Path | None = None
    if asked is None:
        if whole and not (folder / METRICS).exists():
            resume = whole[-1]
            _check_settings(folder, now)
            state.print(
                f"Going on from {resume}, where this run was interrupted (--resume_from_checkpoint false starts anew)."
            )
    elif asked.lower() == "true":
        resume = whole[-1] if whole else None
    elif asked.lower() != "false":
        resume = Path(asked)
        if not _is_whole(resume / mark):
            others = ", ".join(path.name for path in whole_checkpoints(resume.parent, mark)) or "none"
            raise UsageError(
                f"--resume_from_checkpoint {asked}: no whole checkpoint is there ({mark} is missing or torn). Whole ones "
                f"beside it: {others}."
            )

    state.wait_for_everyone()  # every process has seen the same files
    if state.is_main_process:
        (folder / METRICS).unlink(missing_ok=True)
        if resume is None and whole:
            print(f"Removing the checkpoints of the run before this one in {folder}.")
            for path in folder.glob("checkpoint-*"):
                shutil.rmtree(path)
        write_json(folder / SETTINGS, now)
    state.wait_for_everyone()
    return None if resume is None else str(resume)


def _check_settings(folder: Path, now: dict[str, Any]) -> None:
    path = folder / SETTINGS
    if not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = changed_settings(before, now, _FREE)
    if changed:
        raise UsageError(
            f"The run in {folder} was interrupted, and was started with other settings ({'; '.join(changed)}). Give the same "
            "ones to go on, --resume_from_checkpoint true to go on with these, or --resume_from_checkpoint false to start "
            "anew."
        )
