"""`load_rows`: the built-in world, local files and the hub (here without a network) behind one door."""

import json

import datasets
import pytest

from tieback.data.errors import DataError
from tieback.data.sources import load_rows

PAIRS = [{"prompt": f"Question {n}?", "chosen": f"Yes {n}.", "rejected": f"No {n}."} for n in range(20)]


@pytest.fixture
def pairs_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS), encoding="utf-8")
    return path


def test_a_file_loads_as_every_kind(pairs_file):
    preferences = load_rows(str(pairs_file), "preferences").dataset
    assert preferences.column_names == ["prompt", "chosen", "rejected", "prompt_id"]
    assert preferences["chosen"][:] == [row["chosen"] for row in PAIRS]
    assert load_rows(str(pairs_file), "demonstrations").dataset["completion"][:] == [
        row["chosen"] for row in PAIRS
    ]
    assert load_rows(str(pairs_file), "prompts").dataset["prompt"][:] == [row["prompt"] for row in PAIRS]


def test_slices_of_a_file_part_it(pairs_file):
    first = load_rows(str(pairs_file), "prompts", split="train[:90%]").dataset["prompt"]
    second = load_rows(str(pairs_file), "prompts", split="train[90%:]").dataset["prompt"]
    assert [*first, *second] == [row["prompt"] for row in PAIRS]
    assert len(second) == 2
    assert len(load_rows(str(pairs_file), "prompts", split="train[2:7]", max_rows=3).dataset) == 3


def test_dropped_rows_are_counted(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([*PAIRS, {**PAIRS[0], "rejected": PAIRS[0]["chosen"]}]), encoding="utf-8")
    rows = load_rows(str(path), "preferences")
    assert rows.dropped == {"identical": 1}
    assert len(rows.dataset) == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, r"a file has one split, 'train'"),
        ({"split": "train[40:50]"}, r"the split 'train\[40:50\]' of its 20 rows is empty"),
        ({"config": "en"}, "a file has no configurations"),
        ({"max_rows": 0}, "max_rows is 0; it must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_a_file_are_refused(pairs_file, arguments, message):
    with pytest.raises(DataError, match=message):
        load_rows(str(pairs_file), "preferences", **arguments)


def test_columns_that_only_some_rows_have_are_null_in_the_others(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "n": 1}\n{"prompt": "b"}\n', encoding="utf-8")
    assert load_rows(str(path), "prompts").dataset["n"][:] == [1, None]


def test_a_column_of_two_types_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "n": 1}\n{"prompt": "b", "n": {"x": 2}}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"prompts\.jsonl: a column holds values of different types"):
        load_rows(str(path), "prompts")


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/missing/file", "a/b/c"])
def test_a_path_that_leads_nowhere_is_not_asked_of_the_hub(name, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(DataError, match="no such file"):
        load_rows(name, "prompts")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="is a folder: name the file in it"):
        load_rows(str(tmp_path), "prompts")


def test_a_hub_data_set_is_asked_for_by_name_configuration_and_split(monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list(PAIRS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = load_rows("someone/pairs", "preferences", split="test", config="en", max_rows=5)
    assert asked == [("someone/pairs", "en", "test")]
    assert rows.dataset["chosen"][:] == [row["chosen"] for row in PAIRS[:5]]


def test_a_fault_in_a_hub_data_set_names_its_row(monkeypatch):
    rows = [*PAIRS[:2], {**PAIRS[2], "prompt": ""}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    with pytest.raises(
        DataError, match=r"someone/pairs, split train, row 3, column `prompt`: the text is empty"
    ):
        load_rows("someone/pairs", "preferences")


def test_without_a_network_the_message_says_what_else_there_is(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("Couldn't reach 'someone/pairs' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        DataError, match=r"'someone/pairs' is no local file.*ConnectionError.*path of a local file"
    ):
        load_rows("someone/pairs", "preferences")


def test_the_help_desk_has_a_natural_split_for_each_kind():
    demonstrations = load_rows("helpdesk", "demonstrations", max_rows=22, seed=3).dataset
    assert {"prompt", "completion"} <= set(demonstrations.column_names)
    prompts = load_rows("helpdesk", "prompts", max_rows=22, seed=3).dataset
    assert prompts.column_names == ["prompt", "family", "answer"]
    assert prompts[:] == load_rows("helpdesk", "prompts", split="ppo", max_rows=22, seed=3).dataset[:]
    again = load_rows("helpdesk", "prompts", split="demonstrations", max_rows=22, seed=3).dataset
    assert again["prompt"][:] == demonstrations["prompt"][:]
    assert again.column_names == ["prompt", "family", "answer"]


@pytest.mark.parametrize(
    ("kind", "split", "message"),
    [
        ("preferences", "train", r"helpdesk has no ready-made preferences: .*collect"),
        ("demonstrations", "ppo", r"helpdesk's split 'ppo' holds prompts only"),
        (
            "prompts",
            "test",
            r"helpdesk has no split 'test'; its splits are demonstrations, preferences, ppo, evaluation",
        ),
    ],
)
def test_the_help_desk_says_what_it_does_not_have(kind, split, message):
    with pytest.raises(DataError, match=message):
        load_rows("helpdesk", kind, split=split, max_rows=5)
