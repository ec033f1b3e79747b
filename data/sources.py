"""Load rows from the built-in world, a local file or the hub, in the format that a stage needs."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, ReadInstruction

from tieback.data.errors import DataError
from tieback.data.files import SUFFIXES, Record, file_suffix, read_file
from tieback.data.formats import Kind, convert
from tieback.data.worlds import WORLDS


@dataclass
class Rows:
    """What was loaded.

    Args:
        dataset: the rows.
        dropped: number of rows left out, by reason (`data.formats.convert` lists the reasons).
    """

    dataset: Dataset
    dropped: dict[str, int] = field(default_factory=dict)


def load_rows(
    name: str,
    kind: Kind,
    *,
    split: str = "train",
    config: str | None = None,
    max_rows: int | None = None,
    seed: int = 0,
) -> Rows:
    """Load demonstrations, preferences or prompts.

    Args:
        name: "helpdesk" (the built-in world), a local file (.json, .jsonl, .csv, also gzipped, or .parquet), or else a
            data set of the hub, whose scripts are never run.
        kind: "demonstrations" → `prompt` + `completion`, `messages` or `text`; "preferences" → `prompt`, `chosen`,
            `rejected`, `prompt_id` and maybe `annotator`; "prompts" → `prompt` and the source's other columns.
        split: of the hub: any that `datasets` understands. Of a file: "train" or a slice of it ("train[:90%]"). Of the
            help desk: one of its own; "train" is "demonstrations" or "ppo", as `kind` needs.
        config: of a hub data set with several.
        max_rows: read no more rows than this. The help desk makes exactly as many.
        seed: of the help desk's rows.

    Raises:
        DataError: the source cannot be read, or a row is malformed; it names the file, the row and the column.
    """
    if max_rows is not None and max_rows < 1:
        raise DataError(f"max_rows is {max_rows}; it must be at least 1.")
    if name in WORLDS:
        return Rows(WORLDS[name].load_split(kind, split, max_rows, seed))
    records = read_source(name, split, config, max_rows)
    rows, dropped = convert(records[:max_rows], kind, name)
    return Rows(_dataset(rows, name), dict(dropped))


def read_source(
    name: str, split: str = "train", config: str | None = None, max_rows: int | None = None
) -> list[Record]:
    """Rows as they stand in a local file, or in a data set of the hub (see `load_rows`).

    Raises:
        DataError: it cannot be read.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        raise DataError(f"{name} is a folder: name the file in it.")
    if not path.is_file():
        return _hub_records(name, config, split, max_rows)
    if config is not None:
        raise DataError(f"{name}: a file has no configurations; leave out {config!r}.")
    return _slice(read_file(path), split, name)


def _slice(records: list[Record], split: str, name: str) -> list[Record]:
    """Rows of a split such as "train[:90%]"; a file has the split "train" alone."""
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({"train": len(records)})
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"{name}: a file has one split, 'train', which may be sliced ('train[:90%]'); {split!r} is none ({error})."
        ) from error
    chosen = [record for part in parts for record in records[part.from_ : part.to]]
    if not chosen:
        raise DataError(f"{name}: the split {split!r} of its {len(records)} rows is empty.")
    return chosen


def _hub_records(name: str, config: str | None, split: str, max_rows: int | None) -> list[Record]:
    if file_suffix(Path(name)) or re.match(r"[./~]", name) or name.count("/") > 1:
        raise DataError(f"{name}: no such file.")
    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the hub's client raises errors of many libraries
        raise DataError(
            f"{name!r} is no local file ({', '.join(SUFFIXES)}, or these with .gz), and the hub gave no data set of that "
            f"name, configuration {config!r} and split {split!r}: {type(error).__name__}: {error} Without a network, "
            "give the path of a local file, or `helpdesk`."
        ) from error
    if not len(dataset):
        raise DataError(f"{name}: its split {split!r} is empty.")
    chosen = dataset if max_rows is None else dataset.select(range(min(max_rows, len(dataset))))
    return [Record(f"{name}, split {split}, row {number}", row) for number, row in enumerate(chosen, start=1)]


def _dataset(rows: list[dict[str, Any]], name: str) -> Dataset:
    columns = dict.fromkeys(column for row in rows for column in row)
    try:
        return Dataset.from_list([{column: row.get(column) for column in columns} for row in rows])
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(
            f"{name}: a column holds values of different types in different rows ({error})."
        ) from error
