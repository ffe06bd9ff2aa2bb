"""Debian's Chromium without a screen, driven by Selenium, for tests of pages."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
QUIET = [  # without these it looks for hosts of its maker, at every start
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"),
    *("--disable-quic", "--disable-gpu"),
]


@contextmanager
def browse(folder: Path, width: int = 1200, height: int = 800, phone: bool = False) -> Iterator:
    """Give a Selenium driver of a new browser; skip the test where there is none.

    Args:
        folder: for its profile, and for what is downloaded, in `downloads`.
        width: of the page, in CSS pixels.
        height: likewise.
        phone: whether it is a touch screen of two pixels for one.
    """
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.add_experimental_option("prefs", {"download.default_directory": str(folder / "downloads")})
    options.enable_downloads = True
    for argument in ["--headless=new", "--no-sandbox", f"--user-data-dir={folder / 'profile'}", *QUIET]:
        options.add_argument(argument)
    metrics = {"width": width, "height": height, "pixelRatio": 2 if phone else 1, "touch": phone, "mobile": phone}
    options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def until(driver: object, condition: str, seconds: float = 600) -> object:
    """Wait until a JavaScript expression is true; return its value."""
    end = time.monotonic() + seconds
    while not (value := driver.execute_script(f"return {condition}")):
        assert time.monotonic() < end, f"not within {seconds} s: {condition}"
        time.sleep(0.05)
    return value
