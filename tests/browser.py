"""The Chromium in which tests look at the service's page: the system's, or the one that playwright has fetched.

python tests/browser.py starts it once; exit code 0 if that works.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Playwright, expect, sync_playwright

FLAGS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
FLAGS += ["--ignore-gpu-blocklist", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
PATIENCE_MS = 120_000
NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_chromium(playwright: Playwright) -> str | None:
    """Return the program's path, None where there is none; Ubuntu's stub that asks for a snap is none."""
    for found in filter(None, map(shutil.which, NAMES)):
        with Path(found).open("rb") as file:
            if Path("/snap/bin/chromium").exists() or b"/snap/bin/chromium" not in file.read(4096):
                return found
    own = playwright.chromium.executable_path
    return own if Path(own).exists() else None


def launch(playwright: Playwright) -> Browser:
    """Start it headless, with WebGL in software, which takes its time: what is expected of a page may, too."""
    expect.set_options(timeout=PATIENCE_MS)
    return playwright.chromium.launch(executable_path=find_chromium(playwright), args=FLAGS)


@contextlib.contextmanager
def opened() -> Iterator[Browser]:
    """Run it for as long as the context lasts; a test is skipped where there is none."""
    with sync_playwright() as playwright:
        skip_without_browser(playwright)
        browser = launch(playwright)
        yield browser
        browser.close()


def skip_without_browser(playwright: Playwright) -> None:
    """Skip a test where there is no Chromium; fail it in continuous integration."""
    if find_chromium(playwright) is None:
        reason = "no Chromium, in which the page is tested: make browser"
        if os.environ.get("CI", "0") not in ("", "0", "false"):
            pytest.fail(reason)
        pytest.skip(reason)


if __name__ == "__main__":
    with sync_playwright() as started:
        if find_chromium(started) is None:
            sys.exit("no Chromium")
        launch(started).close()
