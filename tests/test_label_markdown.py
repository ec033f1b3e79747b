"""Markdown on the labelling page: what is rendered, what stays as written, and that nothing written comes alive."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from playwright.sync_api import expect
from test_label_page import enter, rank_by_keyboard, served
from test_label_session import read_jsonl, responses_file, write_jsonl

from tieback.cli.errors import UsageError
from tieback.pipeline.labelling.guidelines import keep_guidelines, read_guidelines
from tieback.pipeline.labelling.items import read_responses
from tieback.pipeline.labelling.markdown import MAX_CHARACTERS, to_html


class Parsed(HTMLParser):
    """Tags, attributes and text of some HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("**Recursion** is *it*", "<p><strong>Recursion</strong> is <em>it</em></p>\n"),
        ("one\ntwo", "<p>one<br>two</p>\n"),
        ("- a\n- b", "<ul>\n<li>a</li>\n<li>b</li>\n</ul>\n"),
        ("3. c", '<ol start="3">\n<li>c</li>\n</ol>\n'),
        ("# Title", "<h3>Title</h3>\n"),
        ("```python\nx = '<b>'\n```", "<pre><code>x = '&lt;b&gt;'\n</code></pre>\n"),
        ("`a < b`", "<p><code>a &lt; b</code></p>\n"),
    ],
)  # fmt: skip
def test_it_reads_as_people_will_read_it(text: str, expected: str) -> None:
    assert to_html(text) == expected


def test_a_table_is_a_table() -> None:
    html = to_html("| a | b |\n| --- | ---: |\n| 1 | 2 |")
    assert html is not None
    assert Parsed(html).tags == ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td"]
    assert Parsed(html).attributes == []


AS_WRITTEN = (
    "[here](https://example.com/?q=a)",
    "![cat](https://example.com/cat.png)",
    "<https://example.com>",
    "https://example.com",
    "[1]: https://example.com hidden",
    r"\(x_1 + y_1\) and \[z\]",
    "&lt;b&gt; &amp; &copy;",
    "before\n---\nafter",
)


@pytest.mark.parametrize("text", AS_WRITTEN)
def test_links_pictures_and_formulas_stand_as_they_were_written(text: str) -> None:
    html = to_html(text)
    assert html is not None
    parsed = Parsed(html)
    assert set(parsed.tags) <= {"p", "br", "hr"}
    assert parsed.text.split() == [word for word in text.split() if word != "---"]


HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</div></section><h1>no</h1>",
    "<svg/onload=alert(1)>",
    "<a href='javascript:alert(1)'>x</a>",
    "[x](javascript:alert(1))",
    "[x](data:text/html;base64,PHNjcmlwdD4=)",
    '![x](x"onerror="alert(1))',
    "<style>*{display:none}</style>",
    "<!-- hidden --> seen",
    "```\n</code></pre><script>alert(1)</script>\n```",
    '```"><script>alert(1)</script>\nx\n```',
    "`</code><script>alert(1)</script>`",
    "| <img src=x onerror=alert(1)> |\n| --- |\n| <b onmouseover=alert(1)>x</b> |",
    "# <iframe src=javascript:alert(1)>",
    "> <object data=x>",
    "1. <form action=x><input name=y></form>",
    "**<math><mtext></mtext><mglyph><style><img src=x onerror=alert(1)></style></mglyph></math>**",
    '\u202egnp.exe <b style="position:fixed;inset:0">x</b>',
    "\x00<script\x00>alert(1)</script>",
    "<<script>script>alert(1)<</script>/script>",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_hostile_stays_text(text: str) -> None:
    html = to_html(text)
    assert html is not None
    parsed = Parsed(html)
    allowed = {
        "p",
        "br",
        "pre",
        "code",
        "strong",
        "blockquote",
        "ol",
        "li",
        "h3",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
    }
    assert set(parsed.tags) <= allowed
    assert set(parsed.attributes) <= {"start"}
    # Nothing of it is hidden from the reader: each word of letters stands in what is read, but for a fence's own line.
    words = re.findall(r"[a-z]+", re.sub(r"^```.*$", "", text, flags=re.M))
    assert [word for word in words if word not in parsed.text] == []


def test_what_would_show_nothing_or_take_long_is_shown_as_written() -> None:
    assert to_html("   ") is None
    assert to_html("x" * (MAX_CHARACTERS + 1)) is None
    assert to_html("---") is None
    assert to_html("[" * 20_000 + "**" * 10_000) is not None


# In a browser.


def test_markdown_is_shown_and_r_shows_what_was_written(browser, tmp_path: Path) -> None:
    responses = ["**bold**\n\n- one\n- two", "| a | b |\n|---|---|\n| 1 | 2 |", "`code` <b>no</b>"]
    row = {
        "prompt_id": "p",
        "prompt": [{"role": "user", "content": "# What is *it*?"}],
        "responses": responses,
    }
    items = read_responses(write_jsonl(tmp_path / "responses.jsonl", [row]))
    with served(items, tmp_path / "preferences.jsonl") as url:
        page = enter(browser, url)
        texts = page.locator(".response .prose")
        expect(page.locator(".response strong")).to_have_text("bold")
        expect(page.locator(".response li")).to_have_text(["one", "two"])
        expect(page.locator(".response td")).to_have_text(["1", "2"])
        expect(page.locator(".response code")).to_have_text("code")
        assert "<b>no</b>" in " ".join(texts.all_inner_texts())
        assert "**bold**" not in " ".join(texts.all_inner_texts())
        expect(page.locator(".prompt em")).to_have_text("it")
        assert page.get_by_role("heading", level=2).count() == 3
        page.keyboard.press("r")
        expect(page.locator(".response strong")).to_be_hidden()
        assert sorted(text.strip() for text in texts.all_inner_texts()) == sorted(responses)
        expect(page.get_by_role("button", name="Raw text")).to_have_attribute("aria-pressed", "true")
        page.get_by_role("button", name="Raw text").click()
        expect(page.locator(".response strong")).to_be_visible()


def test_guidelines_fold_away_after_the_first_item_and_each_judgement_names_their_version(
    browser, tmp_path: Path
) -> None:
    file = tmp_path / "guide.md"
    file.write_text("# Judge by\n\n1. **Correctness**\n2. Tone <script>document.title = 'pwned'</script>")
    guidelines = read_guidelines(file)
    output = tmp_path / "preferences.jsonl"
    items = read_responses(responses_file(tmp_path, count=3))
    with served(items, output, guidelines=guidelines) as url:
        page = enter(browser, url)
        box = page.locator(".guidelines")
        expect(box.locator("strong")).to_have_text("Correctness")
        expect(box.locator("strong")).to_be_visible()
        rank_by_keyboard(page)
        expect(page.locator(".count")).to_have_text("1 of 3")
        expect(box.locator("strong")).to_be_hidden()
        # Opened again, they stay so.
        box.locator("summary").click()
        expect(box.locator("strong")).to_be_visible()
        rank_by_keyboard(page)
        expect(page.locator(".count")).to_have_text("2 of 3")
        expect(box.locator("strong")).to_be_visible()
        assert page.title() == "Tieback"
    log = read_jsonl(tmp_path / "preferences.judgements.jsonl")
    judged = [event for event in log if event["event"] == "judged"]
    assert [event["guidelines"] for event in judged] == [guidelines.version] * 2
    kept = keep_guidelines(guidelines, output)
    assert kept.name == f"preferences.guidelines-{guidelines.version}.md"
    assert kept.read_text() == file.read_text()


def test_guidelines_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.md").write_text("  \n")
    (tmp_path / "binary.md").write_bytes(b"\xff\xfe\x00x")
    for name, message in (
        ("missing.md", "cannot be read"),
        ("empty.md", "is empty"),
        ("binary.md", "cannot be read"),
    ):
        with pytest.raises(UsageError, match=f"--guidelines .*{name} {message}"):
            read_guidelines(tmp_path / name)
