"""Read the rows of a local file: JSON, JSON lines, CSV or Parquet, each of the first three also gzipped."""

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet

from tieback.data.errors import DataError, fault

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


class Record(NamedTuple):
    """One row of a source, and where it stands ("pairs.jsonl, line 3")."""

    where: str
    row: dict[str, Any]


def file_suffix(path: Path) -> str:
    """Return the suffix that tells a file's format, without `.gz`; "" where it is none of `SUFFIXES`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"] and suffixes[-2:-1] != [".parquet"]:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else ""


def read_file(path: Path) -> list[Record]:
    """Read every row of a file.

    Rows are named by the line they stand on (JSON lines, CSV: the line they end on) or by their number (JSON,
    Parquet), both counted from 1.

    Raises:
        DataError: the file is missing, empty, of another format or broken; the message says where.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    suffix = file_suffix(path)
    if not suffix:
        raise DataError(
            f"{path}: the name of a data file must end in {', '.join(SUFFIXES)} (or one of these + .gz)."
        )
    try:
        if suffix == ".parquet":
            records = [
                Record(f"{path}, row {number}", row)
                for number, row in enumerate(pyarrow.parquet.read_table(path).to_pylist(), start=1)
            ]
        else:
            with _open(path) as file:
                records = list({".json": _json, ".jsonl": _jsonl, ".csv": _csv}[suffix](path, file))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: it is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: it is not a whole gzip file ({error}).") from error
    except pa.ArrowException as error:
        raise DataError(f"{path}: it cannot be read as Parquet ({error}).") from error
    if not records:
        raise DataError(f"{path}: the file is empty; at least one row is needed.")
    return records


def _open(path: Path) -> IO[str]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _record(where: str, row: Any) -> Record:
    if not isinstance(row, dict):
        raise fault(where, f"a row must be an object of columns, not {json_type(row)}.")
    return Record(where, row)


def _jsonl(path: Path, file: IO[str]) -> Iterator[Record]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise fault(where, f"broken JSON: {error.msg} at character {error.colno}.") from error
            yield _record(where, row)


def _json(path: Path, file: IO[str]) -> Iterator[Record]:
    text = file.read()
    if not text.strip():
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise fault(
            f"{path}, line {error.lineno}",
            f"broken JSON: {error.msg} at character {error.colno}. (A file with one object a line must end in .jsonl.)",
        ) from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: a JSON file must hold one list of rows, not {json_type(rows)}.")
    for number, row in enumerate(rows, start=1):
        yield _record(f"{path}, row {number}", row)


def _csv(path: Path, file: IO[str]) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(file, strict=True)
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise fault(
                    where,
                    f"the row's number of fields is not that of the header, {len(reader.fieldnames or ())}.",
                )
            yield Record(where, row)
    except csv.Error as error:
        raise fault(f"{path}, line {reader.reader.line_num}", f"broken CSV: {error}.") from error


def json_type(value: Any) -> str:
    """Name a value's type as JSON and people name it."""
    if value is None:
        return "nothing (null)"
    names = (
        (bool, "true/false"),
        (str, "text"),
        ((int, float), "a number"),
        (list, "a list"),
        (dict, "an object"),
    )
    return next((name for kind, name in names if isinstance(value, kind)), type(value).__name__)
