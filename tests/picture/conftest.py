"""A headless Chromium, and pages in it. One browser serves all tests of a process."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from llmc.compiler.options import Options
from llmc.compiler.pipeline import compile_model
from llmc.compiler.reports.picture import write

FLAGS = (
    "--headless",
    "--no-sandbox",  # tests run as root in containers
    "--disable-dev-shm-usage",  # it may be tiny there
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1500,1000",
)
MISSING = "no {}: the picture's tests need a browser. On Debian: apt-get install chromium chromium-driver"


@pytest.fixture(scope="session")
def browser(tmp_path_factory) -> Iterator[webdriver.Chrome]:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.fail(MISSING.format("chromedriver" if chromium else "Chromium"), pytrace=False)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()


@pytest.fixture
def open_page(browser, tmp_path) -> Callable[[str], webdriver.Chrome]:
    """Opens the text of a page from a file; the logs then hold what that page did."""

    def opened(text: str) -> webdriver.Chrome:
        path = tmp_path / "page.html"
        path.write_text(text, encoding="utf-8")
        browser.get("about:blank")
        for log in ("browser", "performance"):
            browser.get_log(log)
        browser.get(path.as_uri())
        return browser

    return opened


@pytest.fixture(scope="session")
def picture(tmp_path_factory) -> Callable[..., tuple[Any, str]]:
    """(model, options) -> what was compiled, and the text of its page as `write` left it on the disk."""
    made: dict[str, tuple[Any, str]] = {}

    def drawn(model: str | Path, **options: Any) -> tuple[Any, str]:
        key = f"{model} {options}"
        if key not in made:
            compiled = compile_model(str(model), Options(allow_unsupported=True, **options))
            path = tmp_path_factory.mktemp("pages") / "page.html"
            write(compiled, path)
            made[key] = (compiled, path.read_text(encoding="utf-8"))
        return made[key]

    return drawn
