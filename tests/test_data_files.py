"""Local files: every format gives the same rows, and every fault is named with its place."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from tieback.data.errors import DataError
from tieback.data.files import read_file

ROWS = [
    {"prompt": "What is 1 + 1?", "completion": 'It is "2",\nsure.'},
    {"prompt": "Füße?", "completion": "Feet."},
]


def write_jsonl(path: Path, rows: list) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def write_csv(path: Path) -> Path:
    path.write_text(
        'prompt,completion\nWhat is 1 + 1?,"It is ""2"",\nsure."\nFüße?,Feet.\n', encoding="utf-8"
    )
    return path


def write_parquet(path: Path) -> Path:
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path)
    return path


def write_json(path: Path) -> Path:
    path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "write", "places"),
    [
        ("a.jsonl", lambda path: write_jsonl(path, ROWS), ["line 1", "line 2"]),
        ("a.jsonl.gz", lambda path: write_jsonl(path, ROWS), ["line 1", "line 2"]),
        ("a.JSON", write_json, ["row 1", "row 2"]),
        ("a.csv", write_csv, ["line 3", "line 4"]),
        ("a.b.parquet", write_parquet, ["row 1", "row 2"]),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path, name, write, places):
    path = write(tmp_path / name)
    records = read_file(path)
    assert [record.row for record in records] == ROWS
    assert [record.where for record in records] == [f"{path}, {place}" for place in places]


def test_jsonl_lines_are_counted_with_the_blank_ones_and_a_byte_order_mark_is_read_over(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"prompt": "a"}\n\n{"prompt": "b"}\n', encoding="utf-8")
    assert [(record.where[-6:], record.row) for record in read_file(path)] == [
        ("line 1", {"prompt": "a"}),
        ("line 3", {"prompt": "b"}),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n', r"a\.jsonl, line 2: broken JSON: .* at character"),
        (
            "a.jsonl",
            b'{"prompt": "a"}\n["b"]\n',
            r"a\.jsonl, line 2: a row must be an object of columns, not a list",
        ),
        ("a.jsonl", b"", r"a\.jsonl: the file is empty"),
        ("a.jsonl", b"\n \n", r"a\.jsonl: the file is empty"),
        ("a.jsonl", b'{"prompt": "\xff"}\n', r"a\.jsonl: it is not UTF-8 text"),
        ("a.jsonl.gz", b'{"prompt": "a"}\n', r"a\.jsonl\.gz: it is not a whole gzip file"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"prompt": "a"}\n' * 99)[:-9],
            r"a\.jsonl\.gz: it is not a whole gzip file",
        ),
        ("a.json", b'{"prompt": "a"}', r"a\.json: a JSON file must hold one list of rows, not an object"),
        ("a.json", b'{"prompt": "a"}\n{"prompt": "b"}', r"a\.json, line 2: broken JSON.*must end in \.jsonl"),
        (
            "a.json",
            b'[{"prompt": "a"}, null]',
            r"a\.json, row 2: a row must be an object of columns, not nothing",
        ),
        ("a.json", b" ", r"a\.json: the file is empty"),
        ("a.csv", b"prompt,completion\n", r"a\.csv: the file is empty"),
        ("a.csv", b"prompt,completion\na,b\nc\n", r"a\.csv, line 3: the row's number of fields .* header, 2"),
        ("a.csv", b"prompt\na,b\n", r"a\.csv, line 2: the row's number of fields .* header, 1"),
        ("a.csv", b'prompt\n"a"b\n', r"a\.csv, line 2: broken CSV"),
        ("a.parquet", b"nothing of the kind", r"a\.parquet: it cannot be read as Parquet"),
        ("a.txt", b"hello", r"a\.txt: the name of a data file must end in \.json, \.jsonl"),
    ],
)
def test_a_fault_is_named_with_its_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_file(path)


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(DataError, match=r"b\.jsonl: no such file"):
        read_file(tmp_path / "b.jsonl")


def test_an_empty_parquet_table_is_an_empty_file(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    with pytest.raises(DataError, match="is empty"):
        read_file(path)
