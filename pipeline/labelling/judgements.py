"""The log of judgements on disk, which is only appended to, and the preference rows made from it.

One line of the log is one event: an item was `shown` to an annotator, was `judged`, or the annotator took a judgement
back (`undone`). Lines are written by one call under a lock on the file and flushed to the disk before the page gets
its answer, so that any number of annotators and servers may share a log, and any of them may be killed at any moment.
"""

import fcntl
import json
import logging
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tieback.data.errors import DataError
from tieback.data.rankings import ranking_to_pairs
from tieback.pipeline.labelling.items import Item

ASPECTS = ("quality", "correctness", "helpfulness")
FLAGS = ("all bad", "unsafe", "broken", "skip")
MAX_RATING = 5

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judgement:
    """One annotator's answer on one item.

    Args:
        judgement_id: unique.
        item_id: of the item judged.
        annotator: name.
        time: when it was submitted, ISO 8601, UTC.
        seconds: from when the item was shown.
        order: indices of the responses in the order shown.
        ranks: of the responses as they stand in the file; 1 = best, equal = tied; None where the item is flagged.
        ratings: by aspect, 1 to 5 or None for each response.
        flag: one of `FLAGS` where the item gives no preference.
        note: free text.
        guidelines: version of the guidelines that the annotator had before them; None where there were none.
        adjudicates: whether it settles what others had judged differently; it then stands in the place of theirs.
    """

    judgement_id: str
    item_id: str
    annotator: str
    time: str
    seconds: float
    order: list[int]
    ranks: list[int] | None
    ratings: dict[str, list[int | None]] = field(default_factory=dict)
    flag: str | None = None
    note: str = ""
    guidelines: str | None = None
    adjudicates: bool = False

    @property
    def settles(self) -> bool:
        """Whether it stands in the place of the earlier judgements of its item: an adjudication that was not skipped."""
        return self.adjudicates and self.flag != "skip"


class JudgementLog:
    """The events of one log file, those of other servers included.

    Args:
        path: of the log; it need not exist yet.

    Attributes:
        judgements: those that stand, oldest first, by id.
        shown: by annotator, the item on their page, and since when (seconds since the epoch).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.judgements: dict[str, Judgement] = {}
        self.shown: dict[str, tuple[str, float]] = {}
        self._standing: dict[tuple[str, str], str] = {}
        self._read_to = 0
        self._line = 0

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the log alone, having read what others appended."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._read(file)
            self._file = file
            yield

    def refresh(self) -> None:
        """Read what was appended since."""
        if self.path.is_file():
            with self.locked():
                pass

    def show(self, item: Item, annotator: str) -> None:
        """Note, under the lock, that an annotator is looking at an item."""
        self._append({"event": "shown", "item_id": item.item_id, "annotator": annotator, "time": _now()})

    def judge(self, judgement: Judgement) -> None:
        """Note a judgement, under the lock. It replaces an earlier one of the same item by the same annotator."""
        self._append({"event": "judged", **vars(judgement)})

    def undo(self, annotator: str) -> Judgement | None:
        """Take back, under the lock, the annotator's last judgement that stands, and return it."""
        own = [judgement for judgement in self.judgements.values() if judgement.annotator == annotator]
        if not own:
            return None
        self._append(
            {"event": "undone", "judgement_id": own[-1].judgement_id, "annotator": annotator, "time": _now()}
        )
        return own[-1]

    def _append(self, event: dict[str, Any]) -> None:
        file = self._file
        file.seek(0, os.SEEK_END)
        start = file.tell()
        torn = b""
        if start:
            file.seek(start - 1)
            torn = b"" if file.read(1) == b"\n" else b"\n"
        file.write(torn + (json.dumps(event, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"))
        file.flush()
        os.fsync(file.fileno())
        self._read(file)

    def _read(self, file: Any) -> None:
        """Apply the whole lines beyond what was read already."""
        file.seek(self._read_to)
        for line in file:
            if not line.endswith(b"\n"):
                break
            self._read_to += len(line)
            self._line += 1
            try:
                event = json.loads(line)
                self._apply(event)
            except (ValueError, KeyError, TypeError) as error:
                # A kill cut the line off: the page never heard that it was saved.
                _logger.warning(
                    "%s, line %d is not whole and is left out (%s).", self.path, self._line, error
                )

    def _apply(self, event: dict[str, Any]) -> None:
        kind = event.pop("event")
        if kind == "shown":
            self.shown[event["annotator"]] = (
                event["item_id"],
                datetime.fromisoformat(event["time"]).timestamp(),
            )
        elif kind == "judged":
            judgement = Judgement(**event)
            who = (judgement.item_id, judgement.annotator)
            self.judgements.pop(self._standing.get(who, ""), None)
            self._standing[who] = judgement.judgement_id
            self.judgements[judgement.judgement_id] = judgement
            self.shown.pop(judgement.annotator, None)
        elif kind == "undone":
            self.judgements.pop(event["judgement_id"], None)
        else:
            raise ValueError(f"unknown event {kind!r}")


def new_judgement(
    item: Item, annotator: str, order: Sequence[int], answer: dict[str, Any], shown_at: float | None
) -> Judgement:
    """Make a judgement of what the page sent.

    Args:
        item: that was shown.
        annotator: name.
        order: indices of the responses in the order shown.
        answer: `ranks` and `ratings` in the order shown, `flag`, `note`.
        shown_at: when it was shown, seconds since the epoch.

    Raises:
        DataError: a rank is missing or out of range, or a flag or a rating is unknown; the message is for the annotator.
    """
    count = len(item.row["responses"])
    if not isinstance(answer, dict) or not isinstance(answer.get("ratings") or {}, dict):
        raise DataError("The page sent something that is no judgement: reload it.")
    flag, ranks, ratings = answer.get("flag"), answer.get("ranks"), answer.get("ratings") or {}
    if flag is not None and flag not in FLAGS:
        raise DataError(f"The flag must be one of {', '.join(FLAGS)}.")
    if flag is not None:
        ranks = None
    elif not isinstance(ranks, list) or None in ranks or not _are_numbers(ranks, count, 1, count):
        raise DataError(
            f"Give each of the {count} responses a rank from 1 (best) to {count}; equal ranks tie."
        )
    for aspect, values in ratings.items():
        if aspect not in ASPECTS or not _are_numbers(values, count, 1, MAX_RATING):
            raise DataError(f"Ratings are of {', '.join(ASPECTS)}, from 1 to {MAX_RATING}.")

    def as_filed(values: Sequence[Any]) -> list[Any]:
        filed: list[Any] = [None] * count
        for place, response in enumerate(order):
            filed[response] = values[place]
        return filed

    now = datetime.now(UTC)
    return Judgement(
        judgement_id=uuid.uuid4().hex,
        item_id=item.item_id,
        annotator=annotator,
        time=now.isoformat(),
        seconds=max(0.0, now.timestamp() - shown_at) if shown_at is not None else 0.0,
        order=list(order),
        ranks=None if ranks is None else as_filed(ranks),
        ratings={aspect: as_filed(values) for aspect, values in ratings.items() if any(values)},
        flag=flag,
        note=str(answer.get("note") or ""),
    )


def _are_numbers(values: Any, count: int, low: int, high: int) -> bool:
    """Whether `values` is a list of `count` whole numbers in a range, or None."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(value is None or (type(value) is int and low <= value <= high) for value in values)
    )


def standing(judgements: Iterable[Judgement]) -> list[Judgement]:
    """The judgements but for those of items that an adjudication has settled, of which it alone stands."""
    judgements = list(judgements)
    settled = {judgement.item_id for judgement in judgements if judgement.settles}
    return [each for each in judgements if each.settles or each.item_id not in settled]


def preference_rows(items: Sequence[Item], judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    """All pairs of all rankings, as `pipeline/reward.py` reads them; ties and flagged items give none.

    Of an item that was adjudicated, the pairs are those of the adjudication alone, and have `adjudicated` true.
    """
    by_id = {item.item_id: item for item in items}
    rows = []
    for judgement in standing(judgements):
        item = by_id.get(judgement.item_id)
        if item is not None and judgement.ranks is not None:
            ranked = {
                "prompt_id": judgement.item_id[:16],
                **item.row,
                "ranks": judgement.ranks,
                "annotator": judgement.annotator,
            }
            mark = {"adjudicated": True} if judgement.settles else {}
            rows += [pair | mark for pair in ranking_to_pairs(ranked)]
    return rows


def _now() -> str:
    return datetime.now(UTC).isoformat()
