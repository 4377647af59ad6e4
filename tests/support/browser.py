"""Headless Chromium for tests, driven by Playwright; `BROWSER` is None where no Chromium is installed."""

import contextlib
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Debian's Chromium as root, without traffic of its own.
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
HEIGHT = 850


@contextlib.contextmanager
def open_browser():
    """A Playwright browser, closed afterwards."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


class FilePage:
    """An HTML file in a page of its own; requests and problems (errors, warnings) are collected."""

    def __init__(self, browser, file: Path, width: int, scheme: str = "light", script: bool = True) -> None:
        self.page = browser.new_context(
            viewport={"width": width, "height": HEIGHT}, color_scheme=scheme, java_script_enabled=script
        ).new_page()
        self.requests: list[str] = []
        self.problems: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda message: self._note(message))
        self.page.goto(file.as_uri())

    def _note(self, message) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(message.text)

    def fits_its_width(self) -> bool:
        return self.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")

    def outside_requests(self) -> list[str]:
        return [url for url in self.requests if not url.startswith(("file://", "data:"))]
