"""Items to judge: several responses to a prompt, read from `responses.jsonl` or from an evaluation's pairs."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from tieback.data.conversations import check_prompt
from tieback.data.errors import DataError, fault
from tieback.data.files import Record, read_file
from tieback.data.rankings import check_ranking
from tieback.data.sources import read_source

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


def read_responses(source: str | Path, split: str = "train") -> list[Item]:
    """Read `responses.jsonl`; prompts with less than two different responses are left out, as nothing can be ranked.

    Args:
        source: the file, or a data set of the hub with the columns `prompt` and `responses`.
        split: of the data set.

    Raises:
        DataError: a row is not one of responses, two rows are the same, or none is left.
    """
    items = []
    for where, row in read_source(str(source), split):
        check_ranking(row, where)
        if len(set(row["responses"])) > 1:
            items.append(Item(content_hash(row["prompt"], row["responses"]), row))
    return _distinct(source, items)


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


def read_comparisons(*paths: Path) -> list[Item]:
    """Read the `samples.jsonl` of evaluations as items of two responses; equal ones are left out.

    Of one evaluation these are SFT's and PPO's. Of several, each two of: the first one's SFT, and PPO of each, by the name of its run; in an
    order that mixes prompts and policies.

    Raises:
        DataError: a row is not one of an evaluation, no two responses differ, or the evaluations have no prompt in common.
    """
    evaluations = {path: _read_evaluation(path) for path in paths}
    if len(evaluations) < len(paths):
        raise DataError(f"{paths[0]}: the same evaluation is named twice.")
    prompts = [key for key in evaluations[paths[0]] if all(key in rows for rows in evaluations.values())]
    if not prompts:
        raise DataError(
            f"{paths[-1]}: it has no prompt in common with {paths[0]}; evaluate both on the same ones."
        )
    names = _run_names(paths) if len(paths) > 1 else [SYSTEMS[1]]
    items: dict[str, Item] = {}
    for key in prompts:
        first = evaluations[paths[0]][key]
        written = {SYSTEMS[0]: first["responses"][0]}
        written |= {
            name: evaluations[path][key]["responses"][1] for name, path in zip(names, paths, strict=True)
        }
        for systems in combinations(written, 2):
            responses = [written[name] for name in systems]
            if responses[0] != responses[1]:
                row = {"prompt": first["prompt"], "responses": responses, "systems": []}
                item = Item(content_hash(first["prompt"], responses), row)
                # Where two policies wrote the same, what is said of their texts is said of both.
                items.setdefault(item.item_id, item).row["systems"].append(systems)
    found = list(items.values())
    return _distinct(paths[0], sorted(found, key=lambda item: item.item_id) if len(paths) > 1 else found)


def _read_evaluation(path: Path) -> dict[str, dict[str, Any]]:
    """Rows with `prompt` and `responses`, SFT's and PPO's, by the prompt and by which of its rows it is."""
    rows: dict[str, dict[str, Any]] = {}
    seen: Counter[str] = Counter()
    for record in read_file(path):
        responses = [_response(record, system) for system in SYSTEMS]
        prompt = check_prompt(record.row.get("prompt"), record.where)
        written = json.dumps(prompt)
        seen[written] += 1
        rows[f"{seen[written]} {written}"] = {"prompt": prompt, "responses": responses}
    return rows


def _run_names(paths: Sequence[Path]) -> list[str]:
    """The run of each `<run>/evaluate/samples.jsonl`, as much of its path as tells them apart."""
    parts = [path.resolve().parent.parts for path in paths]
    parts = [folders[:-1] if folders[-1] == "evaluate" else folders for folders in parts]
    depth = 1
    while len({folders[-depth:] for folders in parts}) < len(parts):
        depth += 1
    return ["/".join(folders[-depth:]) for folders in parts]


def _response(record: Record, system: str) -> str:
    side = record.row.get(system)
    if not isinstance(side, dict) or not isinstance(side.get("response"), str):
        raise fault(record.where, "the response of an evaluation's pair is missing.", system)
    return side["response"]


def _distinct(source: str | Path, items: list[Item]) -> list[Item]:
    """The items, each once: rows that say the same are one item."""
    if not items:
        raise DataError(f"{source}: no row holds two different responses, so there is nothing to compare.")
    return list({item.item_id: item for item in items}.values())
