"""Benchmarks whose table and picture stand in a page of the documents."""

import argparse
import re
import sys
from pathlib import Path


def add_page_flags(parser: argparse.ArgumentParser) -> None:
    """Add how many trainings run at a time, and where table, picture and figures go."""
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time (1)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each training (2)")
    parser.add_argument("--page", help="Markdown page whose table is replaced")
    parser.add_argument("--plot", help="file for the picture")
    parser.add_argument("--json", help="file for the figures")


def replace_table(page: Path, text: str) -> None:
    """Put `text` between the two marks of a page.

    Raises:
        SystemExit: the page has no such marks.
    """
    parts = re.split(r"(<!-- table -->\n|\n<!-- end of table -->)", page.read_text(encoding="utf-8"))
    if len(parts) != 5:
        sys.exit(
            f"{page}: one line `<!-- table -->` and one `<!-- end of table -->` must stand around the table."
        )
    parts[2] = text
    page.write_text("".join(parts), encoding="utf-8")
