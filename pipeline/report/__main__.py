"""Write the page of a run again (with people's comparisons since), or of several runs side by side.

python -m pipeline.report runs/helpdesk
python -m pipeline.report runs/seed0 runs/seed1 --output runs/comparison.html
"""

import argparse
from pathlib import Path

from tieback.cli.errors import run


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.report", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="Folders of runs.")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/comparison.html"),
        help="Page of several runs; that of one is its own evaluate/report.html.",
    )
    args = parser.parse_args()
    # After the flags are read: they take seconds to load, and --help needs none of them.
    from tieback.pipeline.report.comparison import evaluation_folder, render_comparison
    from tieback.pipeline.report.gather import write_report

    if len(args.runs) == 1:
        path = write_report(evaluation_folder(args.runs[0]))
    else:
        page = render_comparison(args.runs)
        path = args.output
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    print(f"The page to read: {path}")


if __name__ == "__main__":
    run(main)
