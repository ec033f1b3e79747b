"""Build the site into build/site/: all documents, searchable without a network, and the API reference; a warning is an error.

make docs
"""

import shutil
from pathlib import Path

from nbconvert import MarkdownExporter
from nbconvert.writers import FilesWriter
from sphinx.cmd.build import main as sphinx_build

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "build" / "site"
# Sphinx walks through all that lies beside a document, environments and runs too: it is given copies.
SOURCES = ROOT / "build" / "site-sources"
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")
# Of documents, and of the programs that they link to.
FOLDERS = (
    *("docs", "notebooks", "benchmarks", "examples", "tests", "classic_rl", "data"),
    *("pipeline", "ppo_core", "reward_functions", "reward_model"),
)
FIRST_PAGE = '<!doctype html><meta charset="utf-8"><title>Tieback</title><meta http-equiv="refresh" content="0; url=docs/index.html">'


def main() -> None:
    """Build; the reference is there already (build_reference.py).

    Raises:
        SystemExit: Sphinx had something to say.
    """
    for folder in (OUTPUT, SOURCES):
        shutil.rmtree(folder, ignore_errors=True)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, SOURCES / name, ignore=shutil.ignore_patterns("__pycache__"))
    for page in PAGES:
        shutil.copy(ROOT / page, SOURCES / page)
    doctrees = ROOT / "build" / "doctrees"
    options = [
        "-b",
        "html",
        "-d",
        str(doctrees),
        "--fresh-env",
        "--quiet",
        "--fail-on-warning",
        "--keep-going",
    ]
    if sphinx_build([*options, "-c", str(ROOT / "docs"), str(SOURCES), str(OUTPUT)]):
        raise SystemExit("The site was not built: see the warnings above.")
    shutil.copytree(ROOT / "build" / "reference", OUTPUT / "reference")
    _write_course_as_markdown()
    (OUTPUT / "index.html").write_text(FIRST_PAGE, encoding="utf-8")
    print(f"The site: {OUTPUT / 'index.html'}")


def _write_course_as_markdown() -> None:
    """Each notebook as plain Markdown, with its pictures beside it, for whoever reads in an editor."""
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text, resources = MarkdownExporter().from_filename(str(notebook))
        writer = FilesWriter(build_directory=str(OUTPUT / "course" / notebook.stem))
        writer.write(text, resources, notebook_name="index")


if __name__ == "__main__":
    main()
