"""Take the pictures of pages that the documents show: the report, a completion token by token, and the labelling pages.

    make course                                          # trains into notebooks/runs/course
    python docs/take_pictures.py notebooks/runs/course

Needs a finished run with saved rollouts (`rollout_dir`, here <run>/rollouts) and Debian's Chromium. A second folder takes the
pictures in the place of docs/images/.
"""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Locator, Page, sync_playwright

from tieback.pipeline.label import open_log
from tieback.pipeline.labelling.items import Item, read_comparisons, read_responses
from tieback.pipeline.labelling.page import build_page, open_page
from tieback.pipeline.labelling.session import Session
from tieback.pipeline.replay import page as replay_page
from tieback.pipeline.rollout_files import read_rollout, saved_iterations

IMAGES = Path(__file__).parent / "images"
# Of a palette: a page has few colours, and the file is a quarter.
COLOURS = 64


def main(run_dir: Path, images: Path) -> None:
    """Take all of them.

    Args:
        run_dir: of a finished run.
        images: folder to write into.
    """
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("error: no Chromium here (apt-get install chromium).")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        report = _page(browser, (run_dir / "evaluate" / "report.html").resolve().as_uri(), height=720)
        _save(report, images / "report.png")
        replay = browser.new_page(viewport={"width": 1000, "height": 720}, color_scheme="light")
        replay.set_content(_replayed(run_dir / "rollouts"))
        # The second completion is that of the lowest score, where there is most to see.
        _save(replay.locator("section.pair").nth(1), images / "replay.png")
        responses = read_responses(run_dir / "collect" / "responses.jsonl")[:400]
        with _served(responses) as url:
            _save(_ranking(browser, url), images / "label.png")
        with _served(read_comparisons(run_dir / "evaluate" / "samples.jsonl"), side_by_side=True) as url:
            _save(_labelling(browser, url, height=395), images / "compare.png")
        browser.close()


def _page(browser: Browser, url: str, height: int) -> Page:
    page = browser.new_page(viewport={"width": 1000, "height": height}, color_scheme="light")
    page.goto(url)
    return page


def _replayed(rollouts: Path) -> str:
    """The page of an iteration in the middle, where answers still differ."""
    numbers = saved_iterations(rollouts)
    if not numbers:
        raise SystemExit(f"error: {rollouts} has no rollouts: run ppo with --rollout_dir {rollouts}.")
    return replay_page(read_rollout(rollouts, numbers[len(numbers) // 2]), [])


@contextmanager
def _served(items: list[Item], side_by_side: bool = False) -> Iterator[str]:
    output = Path(tempfile.mkdtemp()) / "preferences.jsonl"
    page = build_page(Session(items, open_log(output), output, side_by_side=side_by_side), "Tieback")
    try:
        yield open_page(page, "127.0.0.1", None, None)
    finally:
        page.close(verbose=False)


def _labelling(browser: Browser, url: str, height: int) -> Page:
    page = _page(browser, url, height)
    page.get_by_label("Your name").fill("ada")
    page.keyboard.press("Enter")
    page.locator(".response").first.wait_for()
    return page


def _ranking(browser: Browser, url: str) -> Page:
    """The third item, with three of its four responses ranked."""
    page = _labelling(browser, url, height=1010)
    for done in ("1 of", "2 of"):
        page.keyboard.type("1234")
        page.keyboard.press("Enter")
        page.locator(".count", has_text=done).wait_for()
    page.keyboard.type("321")
    return page


def _save(shown: Page | Locator, path: Path) -> None:
    shown.screenshot(path=path)
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit("usage: python docs/take_pictures.py RUN [FOLDER]")
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else IMAGES)
