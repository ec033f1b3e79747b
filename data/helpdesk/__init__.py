"""The help desk: the built-in world of short questions, with simulated people who answer them and who judge the answers.

It needs no network: everything is made from a seed. `make_split` draws questions (and demonstrations),
`gold_scores` judges a response by rule, `rank` and `annotate` rank responses as people would, with errors.
"""

import random
from typing import Any

from datasets import Dataset

from tieback.data.errors import DataError
from tieback.data.formats import Kind
from tieback.data.helpdesk.annotator import ANNOTATORS, Annotator, annotate, rank
from tieback.data.helpdesk.demonstrations import write_completion
from tieback.data.helpdesk.judge import GoldScore, gold_reward, gold_scores
from tieback.data.helpdesk.questions import SPLIT_SHARES, draw_questions

SPLITS = tuple(SPLIT_SHARES)
JUDGED_COLUMNS = frozenset({"family", "answer"})
NUM_ANNOTATORS = len(ANNOTATORS)
# For each kind of row, the split that "train" means, and how many rows are made where no number is given.
_DEFAULTS = {"demonstrations": ("demonstrations", 12_000), "prompts": ("ppo", 20_000)}

__all__ = [
    "ANNOTATORS",
    "JUDGED_COLUMNS",
    "NUM_ANNOTATORS",
    "SPLITS",
    "Annotator",
    "GoldScore",
    "annotate",
    "gold_reward",
    "gold_scores",
    "gold_totals",
    "load_split",
    "make_split",
    "rank",
]


def make_split(split: str, size: int, seed: int) -> Dataset:
    """Make `size` rows of a split; the same arguments make the same rows anywhere.

    Prompts are different from one another, and from those of every other split whatever its size and seed.

    Args:
        split: "demonstrations", "preferences", "ppo" or "evaluation".
        size: number of rows.
        seed: of the choice of questions and of the demonstrations.

    Returns:
        Columns `prompt` (one user message), `family`, `answer` (accepted answers), and for demonstrations
        `completion` (one assistant message).

    Raises:
        DataError: no such split, or it has fewer than `size` prompts (the message says how many).
    """
    rng = random.Random(f"helpdesk/{split}/{seed}")
    questions = draw_questions(split, size, rng)
    columns = {
        "prompt": [[{"role": "user", "content": question.prompt}] for question in questions],
        "family": [question.family.name for question in questions],
        "answer": [list(question.fact.answers) for question in questions],
    }
    if split == "demonstrations":
        columns["completion"] = [
            [{"role": "assistant", "content": write_completion(question, rng)}] for question in questions
        ]
    return Dataset.from_dict(columns)


def load_split(kind: Kind, split: str, max_rows: int | None, seed: int) -> Dataset:
    """Rows of a split in the format of `kind`; "train" is the split that the kind is made from.

    Raises:
        DataError: the split has no rows of that kind, or see `make_split`.
    """
    if kind not in _DEFAULTS:
        raise DataError(
            "helpdesk has no ready-made preferences: pipeline/collect.py makes them (<run_dir>/collect/preferences.jsonl)."
        )
    natural, size = _DEFAULTS[kind]
    split = natural if split == "train" else split
    if kind == "demonstrations" and split != "demonstrations":
        raise DataError(
            f"helpdesk's split {split!r} holds prompts only; demonstrations are in its split 'demonstrations'."
        )
    if split == "evaluation":
        size = 500
    dataset = make_split(split, size if max_rows is None else max_rows, seed)
    return (
        dataset.remove_columns("completion") if kind == "prompts" and split == "demonstrations" else dataset
    )


def gold_totals(row: dict[str, Any]) -> list[float]:
    """Gold score of each response in a row with `prompt`, `responses`, `family` and `answer`."""
    count = len(row["responses"])
    columns = {"family": [row["family"]] * count, "answer": [row["answer"]] * count}
    return gold_reward([row["prompt"]] * count, row["responses"], **columns)
