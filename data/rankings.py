"""Ranked responses: the rows of `responses.jsonl`, and the pairs that a ranking gives.

A row: `prompt_id`, `prompt` (text or messages), `responses` (texts), `truncated` (flags), and, once ranked, `ranks`
(1 = best, equal = tied) and `annotator`; beside them the columns of the prompt's row.
"""

from itertools import combinations
from typing import Any

from tieback.data.conversations import TextOrMessages, check_prompt
from tieback.data.errors import fault
from tieback.data.files import json_type


def check_ranking(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a ranking row once its columns hold what they must; `ranks` may be missing or null.

    Raises:
        DataError: a column is missing, of a wrong type or of a wrong length.
    """
    for column in ("prompt", "responses"):
        if column not in row:
            raise fault(where, f"the column `{column}` is missing; there are {', '.join(row)}.")
    check_prompt(row["prompt"], where)
    responses = row["responses"]
    if not isinstance(responses, list) or not all(isinstance(response, str) for response in responses):
        raise fault(where, "a list of texts is wanted.", "responses")
    if not responses:
        raise fault(where, "the list of responses is empty.", "responses")
    for column, kind, name in (("ranks", int, "whole numbers"), ("truncated", bool, "true/false")):
        values = row.get(column)
        if values is None:
            continue
        # bool is an int to Python, and not a rank to people.
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise fault(where, f"a list of {name} is wanted.", column)
        if len(values) != len(responses):
            raise fault(where, f"there are {len(values)} entries for {len(responses)} responses.", column)
    if any(rank < 1 for rank in row.get("ranks") or ()):
        raise fault(where, "ranks count from 1, the best.", "ranks")
    if not isinstance(row.get("annotator"), str | None):
        raise fault(where, f"text is wanted, not {json_type(row['annotator'])}.", "annotator")
    return row


def ranking_to_pairs(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Turn a ranked row into preference rows: each pair of responses with different ranks.

    Returns:
        Rows with `prompt`, `chosen`, `rejected` (conversational where the prompt is), and `prompt_id` and
        `annotator` where the row has them.
    """

    def completion(response: str) -> TextOrMessages:
        return [{"role": "assistant", "content": response}] if isinstance(row["prompt"], list) else response

    shared = {
        column: row[column] for column in ("prompt_id", "prompt", "annotator") if row.get(column) is not None
    }
    pairs = []
    for first, second in combinations(range(len(row["responses"])), 2):
        if row["ranks"][first] == row["ranks"][second]:
            continue
        better, worse = sorted((first, second), key=lambda i: row["ranks"][i])
        pairs.append(
            {
                **shared,
                "chosen": completion(row["responses"][better]),
                "rejected": completion(row["responses"][worse]),
            }
        )
    return pairs
