"""Take screenshots of TensorBoard: `python experiments/benchmarks/screenshots.py --logdir runs`.

Needs the extra `browser` (pip install '.[browser]') and Chromium with its driver (on Debian and Ubuntu:
apt-get install chromium chromium-driver).
"""

import contextlib
import dataclasses
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dae import cli
from dae.errors import RunError, UsageError

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
# Seconds to wait for a tab, and attempts: a page never shows what TensorBoard read after it was loaded.
TIMEOUT_SECONDS, ATTEMPTS = 20, 4
DRAWING_SECONDS = 3  # for curves and points to be drawn


@dataclasses.dataclass(frozen=True)
class ScreenshotArguments:
    """Save screenshots of TensorBoard's Scalars, Images, HParams and Projector tabs in a headless browser."""

    logdir: str = "runs"
    """Folder of finished runs."""
    output: str = "screenshots"
    """Folder of scalars.png, images.png, hparams.png and projector.png."""
    chromium: str | None = None
    """Path of Chromium or Chrome (default: the installed one)."""
    chromedriver: str | None = None
    """Path of its driver (default: the installed one)."""
    width: int = 1100
    """Width of the window in pixels."""
    height: int = 760
    """Height of the window in pixels."""


# TensorBoard nests its elements in shadow trees, which a plain CSS selector does not enter.
FIND = """
const [selector] = arguments, found = [];
(function search(root) {
    found.push(...root.querySelectorAll(selector));
    for (const element of root.querySelectorAll("*")) if (element.shadowRoot) search(element.shadowRoot);
})(document);
return found;
"""
COLUMNS = ("loss", "epochs", "test.quality/psnr", "test.quality/ssim", "validation.quality/psnr")


def find(browser: Any, selector: str) -> list[Any]:
    """Return the elements that a CSS selector matches, in the page and in all shadow trees."""
    return browser.execute_script(FIND, selector)


def has_curves(browser: Any) -> bool:
    """Return whether there are charts, and all have loaded their data."""
    charts = find(browser, "vz-line-chart2")
    return bool(charts) and all(chart.get_attribute("data-loaded-once") is not None for chart in charts)


def has_images(browser: Any) -> bool:
    """Return whether there are images, and all are loaded."""
    images = find(browser, "img[src*=individualImage]")
    return bool(images) and all(int(image.get_attribute("naturalWidth")) > 0 for image in images)


def has_sessions(browser: Any) -> bool:
    """Select a few columns of the table, and return whether it shows metrics in them."""
    for box in find(browser, ".hparam-checkbox, .metric-checkbox"):
        if (box.get_attribute("aria-checked") == "true") != (box.get_attribute("textContent").strip() in COLUMNS):
            browser.execute_script("arguments[0].click()", box)
    cells = [cell.get_attribute("textContent").strip() for cell in find(browser, "vaadin-grid-cell-content")]
    return all(column in cells for column in COLUMNS) and any(re.fullmatch(r"\d+\.\d+", cell) for cell in cells)


def has_points(browser: Any) -> bool:
    """Return whether the Projector, which is a frame within a frame of the page, has loaded its points."""
    while frames := find(browser, "iframe"):
        browser.switch_to.frame(frames[0])
    counts = [element.get_attribute("textContent").strip() for element in find(browser, ".numDataPoints")]
    browser.switch_to.default_content()
    return any(count.isdigit() and count != "0" for count in counts)


# Name of the screenshot -> address of the tab, and a test of whether it is loaded.
TABS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "scalars": ("#scalars&_smoothingWeight=0&tagFilter=loss/total|quality/(psnr|ssim)", has_curves),
    "images": ("#images", has_images),
    "hparams": ("#hparams", has_sessions),
    "projector": ("#projector", has_points),
}


@contextlib.contextmanager
def served(logdir: Path) -> Iterator[str]:
    """Start TensorBoard on a free port and yield its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = next((line for line in process.stderr if " at http://" in line), None)
        if line is None:
            raise RunError("TensorBoard did not start")
        yield line.split(" at ")[1].split()[0]
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def opened_browser(arguments: ScreenshotArguments) -> Iterator[Any]:
    """Start a headless browser. Raises UsageError if none is installed."""
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ModuleNotFoundError:
        raise UsageError("selenium is not installed; needed here: pip install '.[browser]'") from None
    chromium = arguments.chromium or shutil.which("chromium") or shutil.which("google-chrome")
    driver = arguments.chromedriver or shutil.which("chromedriver")
    for flag, path, package in (("--chromium", chromium, "chromium"), ("--chromedriver", driver, "chromium-driver")):
        if path is None or not Path(path).is_file():
            raise UsageError(
                f"{flag}: {path or 'no browser'} not found; install it (Debian: {package}) or give its path"
            )
    options = webdriver.ChromeOptions()
    options.binary_location = str(chromium)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        size = f"--window-size={arguments.width},{arguments.height}"
        for argument in (*FLAGS, size, f"--user-data-dir={profile}"):
            options.add_argument(argument)
        browser = webdriver.Chrome(options=options, service=Service(driver))
        try:
            yield browser
        finally:
            browser.quit()


def loaded(browser: Any, address: str, shows: Callable[[Any], bool]) -> bool:
    """Load a page and return whether it passes the test in time."""
    browser.get("about:blank")  # otherwise the browser would only move to another anchor of the same page
    browser.get(address)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        time.sleep(1)
        if shows(browser):
            return True
    return False


def main() -> None:
    arguments = cli.parse(ScreenshotArguments)
    logdir, output = Path(arguments.logdir), Path(arguments.output)
    if not any(logdir.rglob("events.out.tfevents.*")):
        raise UsageError(f"--logdir: {logdir} holds no TensorBoard files")
    with served(logdir) as address, opened_browser(arguments) as browser:
        output.mkdir(parents=True, exist_ok=True)
        for name, (page, shows) in TABS.items():
            if not any(loaded(browser, address + page, shows) for _ in range(ATTEMPTS)):
                raise RunError(f"{name}: shows nothing after {ATTEMPTS * TIMEOUT_SECONDS} seconds")
            time.sleep(DRAWING_SECONDS)
            browser.save_screenshot(str(output / f"{name}.png"))
            print(output / f"{name}.png")


if __name__ == "__main__":
    cli.run(main)
