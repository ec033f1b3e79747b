"""A further built-in world is one entry in WORLDS: its rows are read by name, and its annotators rank in collect."""

from types import SimpleNamespace

import pytest
from datasets import Dataset

from tieback.cli.errors import UsageError
from tieback.data.sources import load_rows
from tieback.data.worlds import WORLDS, world_of
from tieback.pipeline.collect import annotators_of, rank_responses

# The longer response is the better one, and its annotators never err.
LENGTHS = SimpleNamespace(
    JUDGED_COLUMNS=frozenset({"wanted_length"}),
    NUM_ANNOTATORS=2,
    load_split=lambda kind, split, max_rows, seed: Dataset.from_dict(
        {"prompt": [f"{split} {number}" for number in range(max_rows)], "wanted_length": [seed] * max_rows}
    ),
    gold_totals=lambda row: [-abs(len(text) - row["wanted_length"]) for text in row["responses"]],
    annotate=lambda gold, seed, prompt_id, num_annotators: [
        ([1 + sum(other > own for other in gold) for own in gold], f"ruler {number}")
        for number in range(num_annotators)
    ],
)


@pytest.fixture
def two_worlds(monkeypatch):
    monkeypatch.setitem(WORLDS, "lengths", LENGTHS)


@pytest.mark.usefixtures("two_worlds")
def test_rows_and_annotators_of_a_further_world(tmp_path):
    rows = load_rows("lengths", "prompts", split="train", max_rows=2, seed=3).dataset
    assert rows[:] == {"prompt": ["train 0", "train 1"], "wanted_length": [3, 3]}
    assert world_of(rows.column_names) is LENGTHS
    annotators = annotators_of("simulated", 2, rows, "lengths")
    responses = [
        {**row, "prompt_id": str(n), "responses": ["a", "abc", "abcdefgh"]} for n, row in enumerate(rows)
    ]
    figures = rank_responses(responses, annotators, 2, tmp_path, seed=0)
    # 2, 0 and 5 letters away from the wanted three: three pairs a prompt and annotator, all as the judge orders them.
    assert figures == {"num_pairs": 12, "gold_score/mean": pytest.approx(-7 / 3), "agreement/gold": 1.0}


def test_the_help_desk_is_found_by_its_columns_and_strangers_are_not(tmp_path):
    assert world_of(["prompt", "family", "answer", "prompt_id"]) is WORLDS["helpdesk"]
    assert world_of(["prompt", "answer"]) is None
    prompts = Dataset.from_dict({"prompt": ["Why?"]})
    assert annotators_of("none", 1, prompts, "mine.jsonl") is None
    with pytest.raises(UsageError, match=r"which mine\.jsonl does not have\. Set annotator: none"):
        annotators_of("simulated", 1, prompts, "mine.jsonl")
    with pytest.raises(UsageError, match="num_annotators: helpdesk has 3 simulated annotators, so not 4"):
        annotators_of("simulated", 4, load_rows("helpdesk", "prompts", max_rows=2).dataset, "helpdesk")
