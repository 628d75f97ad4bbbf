"""Takes docs/images/page.png: the service's page with the built-in example translated, in headless Chromium.

python tests/page_picture.py
"""

import sys
import tempfile
from pathlib import Path

from browser import PATIENCE_MS, launch
from playwright.sync_api import Page, expect, sync_playwright
from service import RunningService

from aldm.default_model import default_model

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "page.png"


def main() -> int:
    """Start the service, use the page, write the picture."""
    with (
        tempfile.TemporaryDirectory() as folder,
        RunningService(default_model(), Path(folder)) as service,
        sync_playwright() as playwright,
    ):
        browser = launch(playwright)
        page = browser.new_page(viewport={"width": 1280, "height": 980})
        page.set_default_timeout(PATIENCE_MS)
        page.goto(service.url)
        translate_example(page)
        page.screenshot(path=PICTURE)
        browser.close()
    return 0


def translate_example(page: Page) -> None:
    """Translate the example."""
    page.get_by_role("button", name="Take the example").click()
    expect(page.locator("#status")).to_contain_text("The example is chosen")
    page.get_by_role("button", name="Translate").click()
    expect(page.locator("#status")).to_contain_text("Done in", timeout=PATIENCE_MS)
    page.mouse.move(0, 0)
    page.wait_for_timeout(1000)


if __name__ == "__main__":
    sys.exit(main())
