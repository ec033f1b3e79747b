"""Responses on disk while they are being sampled: appended batch by batch, and continued after a kill.

Every process appends to a file of its own (`responses.jsonl` on the main one). A batch is written by one call and
counts when all of it is there; what a kill tore off is sampled again, with the batch's own seed, so that the finished
file is the same byte for byte however often the run was interrupted and on however many processes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tieback.cli.errors import UsageError
from tieback.cli.results import METRICS, changed_settings

RESPONSES = "responses.jsonl"
_SETTINGS = "responses.settings.json"


def clear_folder(folder: Path) -> None:
    """Remove responses, their rankings and what says that they are complete."""
    for name in ("responses*.jsonl", _SETTINGS, "preferences.jsonl", METRICS):
        for path in folder.glob(name):
            path.unlink()


def claim_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Note the settings beside the responses, or make sure that those already there were sampled under the same.

    Raises:
        UsageError: they were not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _SETTINGS
    if path.is_file() and any(folder.glob("responses*.jsonl")):
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = changed_settings(before, settings)
        if changed:
            raise UsageError(
                f"{folder / RESPONSES} was sampled under other settings ({'; '.join(changed.values())}). Sample anew "
                "with --overwrite, or give another --run_dir."
            )
    _write_whole(path, (json.dumps(settings, indent=2) + "\n").encode())


def compact(folder: Path, batches: Sequence[Sequence[str]]) -> set[int]:
    """Gather every process's whole batches into `responses.jsonl`, in the order of the prompts.

    Args:
        folder: where the files lie.
        batches: the ids of each batch's prompts.

    Returns:
        Indices of the batches that are there.
    """
    lines: dict[str, bytes] = {}
    files = sorted(folder.glob("responses*.jsonl"))
    for path in files:
        lines |= _whole_lines(path)
    done = {index for index, batch in enumerate(batches) if all(prompt_id in lines for prompt_id in batch)}
    _write_whole(folder / RESPONSES, b"".join(lines[i] for index in sorted(done) for i in batches[index]))
    for path in files:
        if path.name != RESPONSES:
            path.unlink()
    return done


def append(folder: Path, process_index: int, rows: Sequence[dict[str, Any]]) -> None:
    """Append a batch to this process's file, and hand it to the operating system before returning."""
    name = RESPONSES if process_index == 0 else f"responses.process{process_index}.jsonl"
    with (folder / name).open("ab") as file:
        file.write(b"".join(_line(row) for row in rows))


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Rows of a finished `responses.jsonl`."""
    return [json.loads(line) for line in (folder / RESPONSES).read_bytes().splitlines()]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write JSON lines, whole or not at all."""
    _write_whole(path, b"".join(_line(row) for row in rows))


def _whole_lines(path: Path) -> dict[str, bytes]:
    lines = {}
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break  # the last line, torn by a kill
        try:
            lines[json.loads(line)["prompt_id"]] = line
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{path}, line {number}: not a row of responses ({error}). Remove the line."
            ) from error
    return lines


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()


def _write_whole(path: Path, content: bytes) -> None:
    draft = path.with_name(path.name + ".tmp")
    draft.write_bytes(content)
    draft.replace(path)
