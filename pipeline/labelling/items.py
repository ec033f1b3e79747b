"""Items to judge: several responses to a prompt, read from `responses.jsonl` or from an evaluation's pairs."""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tieback.data.conversations import check_prompt
from tieback.data.errors import DataError, fault
from tieback.data.files import Record, read_file
from tieback.data.rankings import check_ranking

SYSTEMS = ("sft", "ppo")


@dataclass(frozen=True)
class Item:
    """Responses to one prompt.

    Args:
        item_id: hash of prompt and responses: a judgement belongs to these texts, whatever the file is called.
        row: as in `data.rankings`, with `prompt` and `responses`.
    """

    item_id: str
    row: dict[str, Any]

    def shown_order(self, annotator: str, seed: int) -> list[int]:
        """Indices of the responses in the order in which this annotator sees them, now and after a reload."""
        order = list(range(len(self.row["responses"])))
        random.Random(f"{seed}\n{self.item_id}\n{annotator}").shuffle(order)
        return order


def content_hash(prompt: Any, responses: Sequence[str]) -> str:
    """SHA-256 of what a person is shown."""
    shown = json.dumps([prompt, list(responses)], ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(shown.encode()).hexdigest()


def read_responses(path: Path) -> list[Item]:
    """Read `responses.jsonl`; prompts with less than two different responses are left out, as nothing can be ranked.

    Raises:
        DataError: a row is not one of responses, two rows are the same, or none is left.
    """
    items = []
    for where, row in read_file(path):
        check_ranking(row, where)
        if len(set(row["responses"])) > 1:
            items.append(Item(content_hash(row["prompt"], row["responses"]), row))
    return _distinct(path, items)


def read_known(path: Path) -> list[Item]:
    """Read items whose ranking is known: rows as of `read_responses`, with `ranks`.

    Raises:
        DataError: a row is not one of responses, or has no order of them.
    """
    items = []
    for where, row in read_file(path):
        check_ranking(row, where)
        if len(set(row.get("ranks") or ())) < 2:
            raise fault(where, "the known ranking is missing, or has no order.", "ranks")
        items.append(Item(content_hash(row["prompt"], row["responses"]), row))
    return _distinct(path, items)


def read_comparisons(path: Path) -> list[Item]:
    """Read the `samples.jsonl` of an evaluation as items of two responses, SFT's and PPO's; equal ones are left out.

    Raises:
        DataError: a row is not one of an evaluation, or no two responses differ.
    """
    items = []
    for record in read_file(path):
        responses = [_response(record, system) for system in SYSTEMS]
        prompt = check_prompt(record.row.get("prompt"), record.where)
        if responses[0] != responses[1]:
            items.append(Item(content_hash(prompt, responses), {"prompt": prompt, "responses": responses}))
    return _distinct(path, items)


def _response(record: Record, system: str) -> str:
    side = record.row.get(system)
    if not isinstance(side, dict) or not isinstance(side.get("response"), str):
        raise fault(record.where, "the response of an evaluation's pair is missing.", system)
    return side["response"]


def _distinct(path: Path, items: list[Item]) -> list[Item]:
    """The items, each once: rows that say the same are one item."""
    if not items:
        raise DataError(f"{path}: no row holds two different responses, so there is nothing to compare.")
    return list({item.item_id: item for item in items}.values())
