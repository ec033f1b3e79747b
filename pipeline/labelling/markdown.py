"""Texts of models and people as HTML that can do no harm: Markdown rendered by markdown-it, and sanitised by nh3 once more."""

import nh3
from markdown_it import MarkdownIt

# What is longer is shown as it was written: none waits for the renderer.
MAX_CHARACTERS = 50_000
# These stand as they were written, for the reader judges what was written: a link could hide where it leads, a picture tells its server
# who looks, a definition is shown nowhere, a backslash may be of a formula, and a line of dashes most often parts two texts.
_LEFT_AS_WRITTEN = ("link", "autolink", "image", "reference", "entity", "escape", "lheading")
_TAGS = {
    *("p", "br", "hr", "strong", "em", "s", "code", "pre", "blockquote", "ul", "ol", "li"),
    *("table", "thead", "tbody", "tr", "th", "td", "h3", "h4", "h5", "h6"),
}
_RENDERER = MarkdownIt("js-default", {"html": False, "linkify": False}).disable(_LEFT_AS_WRITTEN)
for _break in ("softbreak", "hardbreak"):
    # Lines stay lines. Without the line feed that would follow, as the page shows paragraphs with all their spaces.
    _RENDERER.add_render_rule(_break, lambda *_: "<br>")


def to_html(text: str) -> str | None:
    """Markdown as HTML of text, lists, tables and code; tags, links and pictures in it stay text.

    Headings are of the third level and below, as the page has headings of its own.

    Returns:
        None where the text is too long, or nothing of it would be seen.
    """
    if len(text) > MAX_CHARACTERS:
        return None
    tokens = _RENDERER.parse(text)
    for token in tokens:
        if token.type.startswith("heading"):
            token.tag = f"h{min(int(token.tag[1]) + 2, 6)}"
    rendered = _RENDERER.renderer.render(tokens, _RENDERER.options, {})
    clean = nh3.clean(rendered, tags=_TAGS, attributes={"ol": {"start"}}, link_rel=None)
    return clean if nh3.clean(clean, tags=set()).strip() else None
