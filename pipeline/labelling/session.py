"""The server side of the labelling page: the order in which annotators get items, and the answers to the page."""

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tieback.cli.errors import UsageError
from tieback.data.conversations import as_messages
from tieback.data.errors import DataError
from tieback.pipeline.labelling.agreement import disputed_items
from tieback.pipeline.labelling.guidelines import Guidelines
from tieback.pipeline.labelling.items import Item
from tieback.pipeline.labelling.judgements import (
    ASPECTS,
    FLAGS,
    MAX_RATING,
    Judgement,
    JudgementLog,
    new_judgement,
    preference_rows,
)
from tieback.pipeline.labelling.markdown import to_html
from tieback.pipeline.labelling.quality import is_hasty, unreliable
from tieback.pipeline.response_files import write_rows

# After this time an item on the page of an annotator who has gone away is offered to others.
LEASE_SECONDS = 30 * 60
MAX_NAME = 64


@dataclass
class Session:
    """Items, the log of judgements on them, and the preference file that follows the log.

    Args:
        items: in the order in which they are offered.
        log: of judgements.
        output: JSON lines of preference pairs, written anew after each judgement.
        overlap: share of the items that every annotator is shown; each other item is one annotator's.
        seed: of the order of the responses on the page.
        side_by_side: two responses, of which one is chosen, instead of a ranking.
        guidelines: what annotators are to judge by.
        known: items whose ranking is known, which are mixed in unmarked and give no preferences.
        known_share: of the items that an annotator is shown, for as long as there are known ones.
        adjudicate: offer the items whose responses were ordered differently by several annotators, to others than those.
        leave_out_hasty: judgements that were made faster than anyone reads give no preferences.
        leave_out_below: nor do those of annotators who order less than this share of the known pairs as known (see `unreliable`).
        clock: seconds since the epoch.

    Raises:
        UsageError: the log holds judgements of other items.
    """

    items: Sequence[Item]
    log: JudgementLog
    output: Path
    overlap: float = 0.0
    seed: int = 0
    side_by_side: bool = False
    guidelines: Guidelines | None = None
    known: Sequence[Item] = ()
    known_share: float = 0.1
    adjudicate: bool = False
    leave_out_hasty: bool = False
    leave_out_below: float = 0.0
    clock: Callable[[], float] = time.time

    def __post_init__(self) -> None:
        known = {item.item_id: item for item in self.known}
        self.items = [item for item in self.items if item.item_id not in known]
        self._by_id = known | {item.item_id: item for item in self.items}
        others = [j for j in self.log.judgements.values() if j.item_id not in self._by_id]
        if others:
            # Their pairs could not be written, for want of the texts.
            raise UsageError(
                f"{self.log.path} holds {len(others)} judgements of responses that are not in this file. Name another "
                "--output for these responses, or the file that was judged, and the --gold file that was mixed in."
            )
        self._lock = threading.Lock()
        if self.log.judgements:
            # With other settings than before, perhaps, of what gives no preferences.
            with self.log.locked():
                self._write_output()

    def start(self, annotator: str) -> dict[str, Any]:
        """What an annotator who has just come, or come back, is shown."""
        return self._answer(annotator, lambda: self._view_next(annotator))

    def judge(self, annotator: str, item_id: str, answer: dict[str, Any]) -> dict[str, Any]:
        """File a judgement, and show what comes next."""

        def file() -> dict[str, Any]:
            item = self._by_id.get(item_id)
            if item is None:
                raise DataError("This item is not in the file any more: reload the page.")
            shown_id, shown_at = self.log.shown.get(annotator, (None, None))
            order = item.shown_order(annotator, self.seed)
            judgement = new_judgement(
                item, annotator, order, answer, shown_at if shown_id == item_id else None
            )
            version = None if self.guidelines is None else self.guidelines.version
            self.log.judge(replace(judgement, guidelines=version, adjudicates=self.adjudicate))
            self._write_output()
            return self._view_next(annotator)

        return self._answer(annotator, file)

    def undo(self, annotator: str, count: int = 1) -> dict[str, Any]:
        """Take back the annotator's last `count` judgements, and show the earliest's item again with the answers given."""

        def take_back() -> dict[str, Any]:
            if type(count) is not int or count < 1:
                raise DataError("The number of judgements to take back is a whole number from 1.")
            judgement = self.log.undo(annotator)
            if judgement is None:
                raise DataError("There is nothing to undo.")
            for _ in range(count - 1):
                before = self.log.undo(annotator)
                if before is None:
                    break
                judgement = before
            self._write_output()
            return self._view(self._by_id[judgement.item_id], annotator, judgement)

        return self._answer(annotator, take_back)

    def is_finished(self) -> bool:
        """Whether each item has been judged by somebody."""
        with self._lock:
            self.log.refresh()
            judgements = list(self.log.judgements.values())
        if self.adjudicate:
            return not self._disputed(judgements)
        return {judgement.item_id for judgement in judgements} >= {item.item_id for item in self.items}

    def _answer(self, annotator: str, act: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            if not isinstance(annotator, str) or not annotator.strip() or len(annotator) > MAX_NAME:
                raise DataError(f"An annotator's name has between 1 and {MAX_NAME} characters.")
            with self._lock, self.log.locked():
                return act()
        except DataError as error:
            return {"error": str(error)}

    def _write_output(self) -> None:
        judgements = list(self.log.judgements.values())
        if self.leave_out_hasty:
            judgements = [j for j in judgements if not is_hasty(j, self._by_id[j.item_id])]
        left_out = unreliable(self.known, judgements, self.leave_out_below)
        judgements = [j for j in judgements if j.annotator not in left_out]
        write_rows(self.output, preference_rows(self.items, judgements))

    def _is_shared(self, item: Item) -> bool:
        digest = hashlib.sha256(f"overlap\n{item.item_id}".encode()).digest()
        return int.from_bytes(digest[:4]) < self.overlap * 2**32

    def _open_items(self, annotator: str) -> list[Item]:
        """Items that this annotator may still be given, those with a known ranking aside."""
        own, taken = set(), set()
        judgements = list(self.log.judgements.values())
        for judgement in judgements:
            if judgement.annotator == annotator:
                own.add(judgement.item_id)
            elif judgement.flag != "skip" and judgement.adjudicates == self.adjudicate:
                taken.add(judgement.item_id)
        disputed = self._disputed(judgements) if self.adjudicate else None
        since = self.clock() - LEASE_SECONDS
        taken |= {
            item_id for other, (item_id, at) in self.log.shown.items() if other != annotator and at > since
        }
        return [
            item
            for item in self.items
            if item.item_id not in own
            and (disputed is None or item.item_id in disputed)
            and (item.item_id not in taken or (self._is_shared(item) and not self.adjudicate))
        ]

    def _disputed(self, judgements: Sequence[Judgement]) -> set[str]:
        """Items whose responses two annotators ordered differently, and that nobody has adjudicated."""
        settled = {judgement.item_id for judgement in judgements if judgement.settles}
        return disputed_items(judgements) - settled

    def _known_next(self, annotator: str) -> Item | None:
        """A known item, where one is due: at places that depend on the annotator's name and on how much they have judged."""
        own = {j.item_id for j in self.log.judgements.values() if j.annotator == annotator}
        waiting = [item for item in self.known if item.item_id not in own]
        digest = hashlib.sha256(f"known\n{self.seed}\n{annotator}\n{len(own)}".encode()).digest()
        due = int.from_bytes(digest[:4]) < self.known_share * 2**32
        return waiting[0] if waiting and due and not self.adjudicate else None

    def _view_next(self, annotator: str) -> dict[str, Any]:
        waiting = self._open_items(annotator)
        if not waiting:
            return {"finished": True, "progress": self._progress(annotator, 0)}
        return self._view(self._known_next(annotator) or waiting[0], annotator)

    def _view(self, item: Item, annotator: str, earlier: Judgement | None = None) -> dict[str, Any]:
        """An item as the page shows it: texts in the order shown, and nothing that tells who wrote them."""
        self.log.show(item, annotator)
        order = item.shown_order(annotator, self.seed)
        messages = as_messages(item.row["prompt"])
        responses = [item.row["responses"][index] for index in order]
        view: dict[str, Any] = {
            "item_id": item.item_id,
            "prompt": messages,
            "prompt_html": [to_html(message["content"]) for message in messages],
            "responses": responses,
            "responses_html": [to_html(text) for text in responses],
            "guidelines": None if self.guidelines is None else vars(self.guidelines),
            "side_by_side": self.side_by_side,
            # A choice between two is made by one key, which leaves no moment for ratings.
            "aspects": [] if self.side_by_side else list(ASPECTS),
            "flags": list(FLAGS),
            "max_rating": MAX_RATING,
            "progress": self._progress(
                annotator, len({other.item_id for other in self._open_items(annotator)} | {item.item_id})
            ),
        }
        if earlier is not None:
            view["earlier"] = {
                "ranks": None if earlier.ranks is None else [earlier.ranks[index] for index in order],
                "ratings": {aspect: [values[i] for i in order] for aspect, values in earlier.ratings.items()},
                "note": earlier.note,
            }
        return view

    def _progress(self, annotator: str, num_waiting: int) -> dict[str, int]:
        done = sum(judgement.annotator == annotator for judgement in self.log.judgements.values())
        return {"done": done, "total": done + num_waiting}
