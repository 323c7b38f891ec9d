"""Pages in headless Chromium. Skipped where there is no Chromium; in CI (environment variable CI) that fails instead."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def give_up(why: str) -> NoReturn:
    """Skip the test, or fail it in CI."""
    if os.environ.get("CI"):
        pytest.fail(f"{why}; with CI set the pages must be tested in a browser.")
    pytest.skip(why)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser of playwright's, with the system's Chromium or playwright's own."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        give_up("playwright is not installed")
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    with sync_playwright() as playwright:
        where = found or playwright.chromium.executable_path
        if not Path(where).exists():
            give_up("no Chromium was found")
        try:
            browser = playwright.chromium.launch(executable_path=where, args=["--no-sandbox"])
        except Error as error:
            give_up(f"Chromium does not start ({str(error).splitlines()[0]})")
        yield browser
        browser.close()


class Visit:
    """A page that was opened, and all that went wrong or left for elsewhere since. Use as a context manager.

    Attributes: page: playwright's; complaints: of the console, and scripts' errors; requests: all but of the page itself.
    """

    def __init__(
        self, browser: Any, path: Path, width: int = 1280, dark: bool = False, scripts: bool = True, touch: bool = False
    ) -> None:
        self.path = path
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", java_script_enabled=scripts,
            has_touch=touch,
        )  # fmt: skip
        self.complaints: list[str] = []
        self.requests: list[str] = []

    def __enter__(self) -> Visit:
        self.page = self.context.new_page()
        address = self.path.as_uri()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("requestfailed", lambda request: self.complaints.append(f"failed: {request.url}"))
        # What is inside the page asks nobody.
        self.page.on(
            "request", lambda request: None if request.url.startswith((address, "data:")) else self.requests.append(request.url)
        )
        self.page.goto(address)
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    @property
    def wider_than_the_screen(self) -> int:
        """Pixels by which the page scrolls sideways."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))
