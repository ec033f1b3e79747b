"""Responses from the hub and judgements to it: what leaves this machine, and that libraries read it as it is."""

import json
import re
import shutil
import sys
from types import SimpleNamespace

import datasets
import pytest
from huggingface_hub import DatasetCard, HfApi
from test_label_session import answer_for, judge_all, make_session, read_jsonl, responses_file

from tieback.cli.errors import UsageError
from tieback.data.errors import DataError
from tieback.data.sources import load_rows
from tieback.pipeline import label
from tieback.pipeline.labelling.guidelines import keep_guidelines, read_guidelines
from tieback.pipeline.labelling.items import read_responses

SECRET = "my aunt Ruth says so"


@pytest.fixture
def judged(tmp_path):
    """Six items judged by Ann and, one with a note and one flagged, by Bob <b@example.org>."""
    (tmp_path / "guidelines.md").write_text("# Prefer what is true")
    guidelines = read_guidelines(tmp_path / "guidelines.md")
    keep_guidelines(guidelines, tmp_path / "preferences.jsonl")
    session = make_session(tmp_path, overlap=1.0, guidelines=guidelines)
    judge_all(session, "Ann")
    name = "Bob <b@example.org>"
    view = session.start(name)
    view = session.judge(
        name, view["item_id"], answer_for(view, note=SECRET, ratings={"quality": [5, 4, None]})
    )
    view = session.judge(name, view["item_id"], {"flag": "unsafe"})
    session.judge(name, view["item_id"], answer_for(view))
    return tmp_path


def run(tmp_path, *flags):
    arguments = [
        "--responses",
        str(tmp_path / "responses.jsonl"),
        "--output",
        str(tmp_path / "preferences.jsonl"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["label.py", *arguments, *flags])
        label.main()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """What was asked of the hub, and a copy of the folder that it was given."""
    asked = SimpleNamespace(repositories=[], down=False, folder=tmp_path / "uploaded")

    def create_repo(api, name, **settings):
        if asked.down:
            raise OSError("no network\nand more")
        asked.repositories.append((name, settings))
        return SimpleNamespace(repo_id=name)

    def upload_folder(api, *, repo_id, repo_type, folder_path, commit_message):
        assert repo_type == "dataset"
        shutil.copytree(folder_path, asked.folder)
        return SimpleNamespace(repo_url=f"https://hub/datasets/{repo_id}")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return asked


def test_pairs_and_judgements_are_uploaded_without_names_and_notes(judged, hub, capsys):
    run(judged, "--push_to_hub", "me/rankings")
    assert hub.repositories == [("me/rankings", {"repo_type": "dataset", "private": True, "exist_ok": True})]
    assert "preferences.jsonl → https://hub/datasets/me/rankings" in capsys.readouterr().out
    everything = "".join(path.read_text(encoding="utf-8") for path in hub.folder.iterdir())
    for private in ("Ann", "Bob", "example.org", SECRET, str(judged)):
        assert private not in everything
    pairs, kept = read_jsonl(hub.folder / "preferences.jsonl"), read_jsonl(judged / "preferences.jsonl")
    alias = {"Ann": "annotator_1", "Bob <b@example.org>": "annotator_2"}
    assert pairs == [{**row, "annotator": alias[row["annotator"]]} for row in kept]
    judgements = read_jsonl(hub.folder / "judgements.jsonl")
    assert len(judgements) == 9
    assert {row["annotator"] for row in judgements} == set(alias.values())
    (flagged,) = [row for row in judgements if row["flag"]]
    assert (flagged["flag"], flagged["ranks"]) == ("unsafe", None)
    assert all(len(row["responses"]) == 3 and row["prompt"] for row in judgements)


def test_the_data_set_is_read_by_datasets_and_by_the_reward_stage(judged, hub, monkeypatch):
    run(judged, "--push_to_hub", "me/rankings", "--hub_private", "false")
    assert hub.repositories[0][1]["private"] is False
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cache = str(judged / "cache")
    pairs = datasets.load_dataset(str(hub.folder), split="train", cache_dir=cache)
    assert {"prompt", "chosen", "rejected", "annotator"} <= set(pairs.column_names)
    assert len(pairs) == len(read_jsonl(judged / "preferences.jsonl"))
    judgements = datasets.load_dataset(str(hub.folder), "judgements", split="train", cache_dir=cache)
    assert judgements["ranks"][0] is not None
    assert [each["quality"] for each in judgements["ratings"] if each["quality"]] != []
    rows = load_rows(str(hub.folder / "preferences.jsonl"), "preferences").dataset
    assert set(rows["annotator"]) == {"annotator_1", "annotator_2"}


def test_the_card_says_how_the_rankings_came_about(judged, hub):
    run(judged, "--push_to_hub", "me/rankings")
    card = DatasetCard.load(hub.folder / "README.md")
    assert [config["config_name"] for config in card.data.to_dict()["configs"]] == [
        "preferences",
        "judgements",
    ]
    assert "9 judgements by 2 people" in card.text
    assert "| items judged | 6 |" in card.text
    assert "| pairs that two people order alike, ties left out | 100% |" in card.text
    assert "| flagged | unsafe 1 |" in card.text
    (name,) = re.findall(r"What people judged by: `(.*)`\.", card.text)
    assert (hub.folder / name).read_text() == "# Prefer what is true"


def test_what_cannot_be_pushed_is_said_and_nothing_is_lost(judged, hub, tmp_path_factory):
    before = (judged / "preferences.jsonl").read_bytes()
    hub.down = True
    with pytest.raises(
        UsageError, match=r"--push_to_hub me/rankings: the hub did not take it \(.*no network\)"
    ):
        run(judged, "--push_to_hub", "me/rankings")
    assert (judged / "preferences.jsonl").read_bytes() == before
    (kept,) = judged.glob("preferences.guidelines-*.md")
    kept.unlink()
    with pytest.raises(UsageError, match=r"preferences\.guidelines-\w+\.md is missing, the guidelines"):
        run(judged, "--push_to_hub", "me/rankings")
    empty = tmp_path_factory.mktemp("empty")
    responses_file(empty)
    with pytest.raises(UsageError, match=r"has no preference pairs to push: judge some items first"):
        run(empty, "--push_to_hub", "me/rankings")


def test_responses_come_from_a_data_set_of_the_hub(tmp_path, monkeypatch):
    rows = read_jsonl(responses_file(tmp_path))
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, split))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    from_hub = read_responses("me/responses", "test[:6]")
    assert asked == [("me/responses", "test[:6]")]
    # An item is its texts, so judgements of the file's items are judgements of these.
    assert from_hub == read_responses(tmp_path / "responses.jsonl")
    assert len(read_responses(tmp_path / "responses.jsonl", "train[:2]")) == 2
    (tmp_path / "other.jsonl").write_text(json.dumps({"prompt": "p"}) + "\n")
    with pytest.raises(DataError, match=re.escape("the column `responses` is missing")):
        read_responses(tmp_path / "other.jsonl")
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        read_responses(tmp_path / "nowhere.jsonl")
