"""The help desk: the built-in world of short questions, with simulated people who answer them and who judge the answers.

It needs no network: everything is made from a seed. `make_split` draws questions (and demonstrations),
`gold_scores` judges a response by rule, `rank` and `annotate` rank responses as people would, with errors.
"""

import random

from datasets import Dataset

from tieback.data.helpdesk.annotator import ANNOTATORS, Annotator, annotate, rank
from tieback.data.helpdesk.demonstrations import write_completion
from tieback.data.helpdesk.judge import GoldScore, gold_reward, gold_scores
from tieback.data.helpdesk.questions import SPLIT_SHARES, draw_questions

SPLITS = tuple(SPLIT_SHARES)

__all__ = [
    "ANNOTATORS",
    "SPLITS",
    "Annotator",
    "GoldScore",
    "annotate",
    "gold_reward",
    "gold_scores",
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
