"""Pictures of what TensorBoard shows of runs, from a real browser: python experiments/screenshots.py --logdir runs.

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
# To wait for a tab, and how often: what TensorBoard has not read yet when a page is loaded never comes on it.
SECONDS, TIMES = 20, 4
SETTLING = 3  # more, for its curves and points to be drawn


@dataclasses.dataclass(frozen=True)
class ScreenshotArguments:
    """Open TensorBoard's Scalars, Images, HParams and Projector in a headless browser and save what they show."""

    logdir: str = "runs"
    """Folder of finished runs."""
    output: str = "screenshots"
    """Folder for scalars.png, images.png, hparams.png and projector.png."""
    chromium: str | None = None
    """Path of Chromium or Chrome (default: the one that is installed)."""
    chromedriver: str | None = None
    """Path of its driver (default: the one that is installed)."""
    width: int = 1100
    """Of the window, in pixels."""
    height: int = 760
    """Of the window, in pixels."""


# TensorBoard's elements are in trees of their own, below one another, which a plain selector does not enter.
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
    """The elements of the page that a CSS selector finds, in whatever tree."""
    return browser.execute_script(FIND, selector)


def has_curves(browser: Any) -> bool:
    """Whether there are charts, and all have their data."""
    charts = find(browser, "vz-line-chart2")
    return bool(charts) and all(chart.get_attribute("data-loaded-once") is not None for chart in charts)


def has_pictures(browser: Any) -> bool:
    """Whether there are pictures, and all are loaded."""
    pictures = find(browser, "img[src*=individualImage]")
    return bool(pictures) and all(int(picture.get_attribute("naturalWidth")) > 0 for picture in pictures)


def has_sessions(browser: Any) -> bool:
    """Whether the table has a line of figures for a run, of a few columns; chooses these."""
    for box in find(browser, ".hparam-checkbox, .metric-checkbox"):
        if (box.get_attribute("aria-checked") == "true") != (box.get_attribute("textContent").strip() in COLUMNS):
            browser.execute_script("arguments[0].click()", box)
    cells = [cell.get_attribute("textContent").strip() for cell in find(browser, "vaadin-grid-cell-content")]
    return all(column in cells for column in COLUMNS) and any(re.fullmatch(r"\d+\.\d+", cell) for cell in cells)


def has_points(browser: Any) -> bool:
    """Whether the codes are read and laid out; the Projector is a page within a page within the page."""
    while frames := find(browser, "iframe"):
        browser.switch_to.frame(frames[0])
    counts = [element.get_attribute("textContent").strip() for element in find(browser, ".numDataPoints")]
    browser.switch_to.default_content()
    return any(count.isdigit() and count != "0" for count in counts)


# Name of the picture -> the page's address below TensorBoard's, and whether it shows what it should.
TABS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "scalars": ("#scalars&_smoothingWeight=0&tagFilter=loss/total|quality/(psnr|ssim)", has_curves),
    "images": ("#images", has_pictures),
    "hparams": ("#hparams", has_sessions),
    "projector": ("#projector", has_points),
}


@contextlib.contextmanager
def served(logdir: Path) -> Iterator[str]:
    """A TensorBoard of its own on a free port of this machine; its address."""
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
def opened(arguments: ScreenshotArguments) -> Iterator[Any]:
    """A headless browser of its own; raises UsageError where there is none."""
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ModuleNotFoundError:
        raise UsageError("selenium is not installed, and needed here: pip install '.[browser]'") from None
    chromium = arguments.chromium or shutil.which("chromium") or shutil.which("google-chrome")
    driver = arguments.chromedriver or shutil.which("chromedriver")
    for flag, path, package in (("--chromium", chromium, "chromium"), ("--chromedriver", driver, "chromium-driver")):
        if path is None or not Path(path).is_file():
            raise UsageError(f"{flag}: {path or 'none'} found; install it (Debian: {package}) or give its path")
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
    """Whether the page shows what it should within so many seconds."""
    browser.get("about:blank")  # else the address is but another place on the same page
    browser.get(address)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        time.sleep(1)
        if shows(browser):
            return True
    return False


def main() -> None:
    arguments = cli.parse(ScreenshotArguments)
    logdir, output = Path(arguments.logdir), Path(arguments.output)
    if not any(logdir.rglob("events.out.tfevents.*")):
        raise UsageError(f"--logdir: {logdir} holds no run")
    with served(logdir) as address, opened(arguments) as browser:
        output.mkdir(parents=True, exist_ok=True)
        for name, (page, shows) in TABS.items():
            if not any(loaded(browser, address + page, shows) for _ in range(TIMES)):
                raise RunError(f"{name}: shows nothing after {TIMES * SECONDS} seconds")
            time.sleep(SETTLING)
            browser.save_screenshot(str(output / f"{name}.png"))
            print(output / f"{name}.png")


if __name__ == "__main__":
    cli.run(main)
