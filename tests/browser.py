"""A headless Chromium for tests of pages; they are skipped, with the reason, where there is none."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def chromium() -> Iterator[Any]:
    """A Playwright ``Browser``: the system's Chromium or Chrome, or else the one that Playwright installed.

    Source: https://playwright.dev/python/docs/api/class-browsertype
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as api:
        path = next((found for name in _NAMES if (found := shutil.which(name))), api.chromium.executable_path)
        if not Path(path).is_file():
            pytest.skip(
                f"no Chromium: none of {', '.join(_NAMES)} on the path, nor Playwright's own (playwright install)"
            )
        browser = api.chromium.launch(executable_path=path)
        try:
            yield browser
        finally:
            browser.close()
