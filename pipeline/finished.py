"""Whether a stage has come to its end already: it is then left as it is, and never replaced unless that is asked for."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState

from tieback.cli.errors import UsageError
from tieback.cli.results import METRICS, changed_settings
from tieback.pipeline.resume import FREE, SETTINGS, as_json

# Settings that change nothing in what a stage that trains has made.
_WITHOUT_EFFECT = FREE - {"max_steps", "num_train_epochs"}
# The same for stages that sample. Models and data are compared by their content.
PLACES = (
    *("config", "run_dir", "output_dir", "ddp_timeout", "model_name_or_path", "dataset_name"),
    *("sft_model_path", "ppo_model_path", "reward_model_path"),
)


def is_finished(
    output_dir: str | Path,
    settings: Mapping[str, Any],
    overwrite: bool,
    asked: str | None = None,
    free: Collection[str] = _WITHOUT_EFFECT,
) -> bool:
    """Whether nothing is left to do: the stage came to its end with these settings and inputs. All processes must call.

    A stage is finished when its folder holds metrics.json, which is written last; settings.json beside it says with what.

    Args:
        output_dir: folder of the stage.
        settings: what the recipe and the command line set, with digests of what the stage starts from.
        overwrite: the stage is to run anew in any case.
        asked: `resume_from_checkpoint`; a finished run goes on from a checkpoint where one is asked for.
        free: names that may differ.

    Raises:
        UsageError: it came to its end with others.
    """
    state, folder = PartialState(), Path(output_dir)
    finished = (folder / METRICS).is_file() and not overwrite and asked in (None, "false")
    written = folder / SETTINGS
    before = json.loads(written.read_text(encoding="utf-8")) if finished and written.is_file() else {}
    state.wait_for_everyone()  # every process has seen the same files
    if not finished:
        return False
    changed = changed_settings(before, as_json(settings), free)
    if changed:
        further = ", or train it further with --resume_from_checkpoint true" if changed.keys() <= FREE else ""
        raise UsageError(
            f"{folder} holds a finished run of other settings or inputs ({'; '.join(changed.values())}). Name another "
            f"--run_dir; or replace what is there with --overwrite{further}."
        )
    state.print(f"{folder} is finished, with these settings and inputs (--overwrite runs it anew).")
    return True
