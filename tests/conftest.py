"""What all tests share: a collector that looks at their own objects alone, and a browser (Debian's Chromium, driven by Playwright)."""

import gc
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright


def pytest_collection_finish() -> None:
    # Trainer collects garbage in every training; it would look through all that the libraries made when they were imported.
    gc.freeze()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here (apt-get install chromium)")
    with sync_playwright() as playwright:
        # Its sandbox does not work for root, as in a container.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()
