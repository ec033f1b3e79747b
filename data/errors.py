"""The error that bad data raises: it says where the fault is and what to do."""

from tieback.cli.errors import UsageError


class DataError(UsageError):
    """Bad input data. The message names the file (or data set), the row and the column at fault."""


def fault(where: str, problem: str, column: str | None = None) -> DataError:
    """Make a `DataError`.

    Args:
        where: file and row, such as "pairs.jsonl, line 3".
        problem: what is wrong, and what is wanted instead.
        column: the column at fault.
    """
    return DataError(f"{where}, column `{column}`: {problem}" if column else f"{where}: {problem}")
