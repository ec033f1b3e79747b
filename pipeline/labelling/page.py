"""The page in the browser: one Gradio component whose script asks `Session` what to show."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from tieback.pipeline.labelling.session import Session

# Before Gradio is imported: it would send usage figures.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr

_FOLDER = Path(__file__).parent
# Fonts of the machine: the default theme would fetch its own from the network.
_FONTS = ["system-ui", "sans-serif"]
_SECONDS_BETWEEN_LOOKS = 1.0


def build_page(session: Session, title: str) -> gr.Blocks:
    """The page of a session."""

    # Gradio passes on one argument.
    def start(request: dict) -> dict:
        return session.start(request["annotator"])

    def judge(request: dict) -> dict:
        return session.judge(request["annotator"], request["item_id"], request["answer"])

    def undo(request: dict) -> dict:
        return session.undo(request["annotator"], request["count"])

    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.HTML(
            html_template='<div class="desk"></div>',
            js_on_load=(_FOLDER / "page.js").read_text(encoding="utf-8"),
            apply_default_css=False,
            server_functions=[start, judge, undo],
        )
    return page


def open_page(page: gr.Blocks, host: str, port: int | None, auth: tuple[str, str] | None) -> str:
    """Serve the page from a thread of its own, until `page.close()`.

    Args:
        page: from `build_page`.
        host: address to bind to.
        port: of the server; the first free one from 7860 where None.
        auth: user name and password that the page asks for.

    Returns:
        The page's address.
    """
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        auth=auth,
        share=False,
        quiet=True,
        ssr_mode=False,
        footer_links=[],
        prevent_thread_lock=True,
        css=(_FOLDER / "page.css").read_text(encoding="utf-8"),
        theme=gr.themes.Base(font=_FONTS, font_mono=["ui-monospace", "monospace"]),
        allowed_paths=[],
        max_file_size=0,  # the page takes no files, so the server is sent none
    )
    return str(url)


def serve(
    page: gr.Blocks,
    host: str,
    port: int | None,
    auth: tuple[str, str] | None,
    until: Callable[[], bool] | None,
) -> None:
    """Serve the page until ctrl-C, or until `until` says so; see `open_page`."""
    url = open_page(page, host, port, auth)
    print(f"Open {url} in a browser; ctrl-C here ends it. What the page has taken is on disk.", flush=True)
    try:
        while until is None or not until():
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        # The last reply has still to reach the page.
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    except KeyboardInterrupt:
        pass
    page.close(verbose=False)
