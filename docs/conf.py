"""The site: README, the guides, the course and the figures as pages, beside the API reference (see build_site.py)."""

import os
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

REFERENCE = Path(__file__).parents[1] / "build" / "reference"

project = "Tieback"
extensions = ["myst_nb"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "benchmarks/RESULTS.md", "notebooks/*.ipynb"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # a notebook is shipped with its outputs
html_theme = "furo"
html_title = "Tieback"
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False

# Behind docs/index.md, whose tables a reader of the files sees: what the site's menu is made of.
CONTENTS = """
```{toctree}
:hidden:
:caption: Start
README <../README>
ranking
```

```{toctree}
:hidden:
:caption: Learn
The course: a gridworld <../notebooks/1_gridworld>
The course: CartPole <../notebooks/2_cartpole>
The course: Pong <../notebooks/3_pong>
The course: a language model <../notebooks/4_rlhf>
tieback
pong
```

```{toctree}
:hidden:
:caption: Train
pretrained
human_feedback
rewards
multi_turn
samplers
scaling
overoptimization
migrating_from_trl
```

```{toctree}
:hidden:
:caption: Look up
options
glossary
ablations
Benchmarks <../benchmarks/RESULTS>
Contributing <../CONTRIBUTING>
Changelog <../CHANGELOG>
API reference <https://reference.invalid/>
```
"""


def add_contents(_: Sphinx, docname: str, source: list[str]) -> None:
    """Put the menu behind the first page."""
    if docname == root_doc:
        source[0] += CONTENTS


def reference_page(path: Path) -> Path | None:
    """The page of the API reference that shows a source file: its module's, or its package's.

    Args:
        path: of the file, from the root of the project.
    """
    own = REFERENCE / "tieback" / path.with_suffix(".html")
    package = own.parent.with_suffix(".html")
    return next((page for page in (own, package) if page.is_file() and page.parent != REFERENCE), None)


def link_sources(app: Sphinx, doctree: nodes.document) -> None:
    """Let a link to a source file open its page of the reference; without one it stays a download."""
    here = Path(app.env.docname).parent
    for node in list(doctree.findall(addnodes.download_reference)):
        page = reference_page(Path(os.path.normpath(here / node["reftarget"])))
        if page is not None:
            uri = os.path.relpath(page.relative_to(REFERENCE.parent), here)
            node.replace_self(nodes.reference("", "", *node.children, refuri=uri))


def link_reference(app: Sphinx, pagename: str, _: str, context: dict[str, object], __: object) -> None:
    """The menu can name addresses alone: set the reference's to where it lies."""
    uri = app.builder.get_relative_uri(pagename, "reference/index")
    menu = "furo_navigation_tree"
    context[menu] = str(context[menu]).replace("https://reference.invalid/", uri)


def setup(app: Sphinx) -> None:
    """Register the above."""
    app.connect("source-read", add_contents)
    app.connect("doctree-read", link_sources, priority=400)  # before downloads are gathered
    app.connect("html-page-context", link_reference, priority=900)
