"""The data sets that a trainer is given, in the forms that users have them in."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import pyarrow as pa
from datasets import Dataset

from tieback.cli.errors import UsageError

# A data set, or its rows.
PromptRows: TypeAlias = Dataset | Sequence[Mapping[str, Any]]


def read_set(name: str, given: PromptRows | None) -> Dataset | None:
    """A data set or rows as a data set of plain Python values; None where there is none.

    Args:
        name: "train_dataset" or "eval_dataset", for messages.
        given: what the trainer was called with.

    Raises:
        UsageError: it is something else (a stream, several splits), or rows that have no table in common.
    """
    if given is None:
        return None
    if isinstance(given, Dataset):
        # In the format of another library a row of messages is no list.
        return given.with_format(None)
    if isinstance(given, Mapping):
        raise UsageError(
            f"{name} holds several data sets ({', '.join(map(str, given))}). Choose one of them, such as "
            f"dataset[{next(iter(given), 'train')!r}]."
        )
    if not isinstance(given, list | tuple) or not all(isinstance(row, Mapping) for row in given):
        raise UsageError(
            f"{name} is of type {type(given).__name__}. Give a datasets.Dataset or a list of rows, such as "
            '[{"prompt": "…"}]. Every prompt is checked before training, so a stream must be read first: '
            "Dataset.from_generator, or Dataset.from_list(list(rows))."
        )
    if not given:
        raise UsageError(f"{name} is empty.")
    try:
        return Dataset.from_list([dict(row) for row in given])
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise UsageError(
            f"{name}: the rows are no table: {error}. Give every row the same columns, each of one type."
        ) from error


def read_eval_sets(
    given: PromptRows | Mapping[str, PromptRows] | None,
) -> Dataset | dict[str, Dataset] | None:
    """The evaluation data (see `read_set`): one set, or several by name.

    Raises:
        UsageError: also where there are several, but none at all.
    """
    if not isinstance(given, Mapping):
        return read_set("eval_dataset", given)
    if not given:
        raise UsageError("eval_dataset is an empty mapping: leave it out, or name a data set in it.")
    sets = {name: read_set(f"eval_dataset[{name!r}]", rows) for name, rows in given.items()}
    return {name: dataset for name, dataset in sets.items() if dataset is not None}


def by_name(name: str, sets: Dataset | dict[str, Dataset] | None) -> dict[str, Dataset]:
    """Each data set by what messages call it: `name`, or `name['key']` where there are several."""
    if sets is None:
        return {}
    return (
        {f"{name}[{key!r}]": dataset for key, dataset in sets.items()}
        if isinstance(sets, dict)
        else {name: sets}
    )
