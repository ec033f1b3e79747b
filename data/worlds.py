"""The built-in worlds: rows made from a seed, with no network, and simulated annotators who rank the responses to them."""

from collections.abc import Collection, Sequence
from typing import Any, Protocol

from datasets import Dataset

from tieback.data import helpdesk
from tieback.data.formats import Kind


class World(Protocol):
    """What a built-in world offers; a package or module of `data` is one by having these names."""

    # Columns of a prompt's row that the gold judge reads.
    JUDGED_COLUMNS: frozenset[str]
    # Annotators that there are; so many can rank a prompt's responses.
    NUM_ANNOTATORS: int

    def load_split(self, kind: Kind, split: str, max_rows: int | None, seed: int) -> Dataset:
        """Rows of a split in the format of `kind` (see `tieback.data.sources.load_rows`)."""

    def gold_totals(self, row: dict[str, Any]) -> list[float]:
        """Gold score of each of a row's `responses`; the row has `JUDGED_COLUMNS`."""

    def annotate(
        self, gold_totals: Sequence[float], seed: int, prompt_id: str, num_annotators: int
    ) -> list[tuple[list[int], str]]:
        """Of each of so many annotators the ranks (1 = best) of responses with these gold scores, and the name."""


WORLDS: dict[str, World] = {"helpdesk": helpdesk}


def world_of(columns: Collection[str]) -> World | None:
    """World whose annotators can judge prompts with these columns; None where there is none."""
    return next((world for world in WORLDS.values() if set(columns) >= world.JUDGED_COLUMNS), None)
