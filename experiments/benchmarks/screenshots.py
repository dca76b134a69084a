"""Take screenshots of TensorBoard: `python experiments/benchmarks/screenshots.py --logdir runs`.

Needs the extra `browser` (pip install '.[browser]') and Chromium with its driver (on Debian and Ubuntu:
apt-get install chromium chromium-driver).
"""

import contextlib
import dataclasses
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dae import cli
from dae.errors import RunError, UsageError

FLAGS = ("--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1900,1050")
# Seconds to wait for a tab, and attempts: a page never shows what TensorBoard read after it was loaded.
TIMEOUT_SECONDS, ATTEMPTS = 20, 4
DRAWING_SECONDS = 3  # for curves and points to be drawn


@dataclasses.dataclass(frozen=True)
class ScreenshotArguments:
    """Save screenshots of TensorBoard's Scalars, Images, Graphs and HParams tabs in a headless browser."""

    logdir: str = "runs"
    """Folder of finished runs."""
    output: str = "screenshots"
    """Folder of scalars.png, images.png, train_step.png, network.png and hparams.png."""


# TensorBoard nests its elements in shadow trees, which a plain CSS selector does not enter.
FIND = """
const [selector] = arguments, found = [];
(function search(root) {
    found.push(...root.querySelectorAll(selector));
    for (const element of root.querySelectorAll("*")) if (element.shadowRoot) search(element.shadowRoot);
})(document);
return found;
"""


def find(browser: Any, selector: str) -> list[Any]:
    """Return the elements that a CSS selector matches, in the page and in all shadow trees."""
    return browser.execute_script(FIND, selector)


def texts(browser: Any, selector: str) -> list[str]:
    """Return the texts of these elements, all at once, since elements of a graph that is redrawn are replaced."""
    script = FIND.replace("return found", "return found.map((element) => element.textContent.trim())")
    return browser.execute_script(script, selector)


def has_curves(browser: Any) -> bool:
    """Return whether there are charts, and all have loaded their data."""
    charts = find(browser, "vz-line-chart2")
    return bool(charts) and all(chart.get_attribute("data-loaded-once") is not None for chart in charts)


def has_images(browser: Any) -> bool:
    """Return whether there are images, and all are loaded."""
    images = find(browser, "img[src*=individualImage]")
    return bool(images) and all(int(image.get_attribute("naturalWidth")) > 0 for image in images)


def has_graph(browser: Any) -> bool:
    """Return whether the graph of the train step is drawn."""
    return bool(find(browser, "g.node"))


def has_layers(browser: Any) -> bool:
    """Select the tag run/network, double-click the network, and return whether its layers are drawn."""
    for controls in find(browser, "tf-graph-controls"):
        browser.execute_script("if (arguments[0]._selectedTagIndex !== 1) arguments[0]._selectedTagIndex = 1", controls)
    nodes = find(browser, "g.node")
    if len(nodes) == 1:
        from selenium.webdriver import ActionChains

        ActionChains(browser).double_click(nodes[0]).perform()
    return len(nodes) > 1 and not any("shard_0" in text for text in texts(browser, "g.node"))  # is in a train step


def has_sessions(browser: Any) -> bool:
    """Return whether the table shows settings and metrics."""
    cells = texts(browser, "vaadin-grid-cell-content")
    return "quality/psnr" in cells and any(re.fullmatch(r"\d+\.\d+", cell) for cell in cells)


# Name of the screenshot -> address of the tab, and a test of whether it is loaded.
TABS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "scalars": ("#scalars&_smoothingWeight=0&tagFilter=loss/total|quality/(psnr|ssim)", has_curves),
    "images": ("#images", has_images),
    "train_step": ("#graphs", has_graph),
    "network": ("#graphs", has_layers),
    "hparams": ("#hparams", has_sessions),
}


def serve(logdir: Path) -> str:
    """Start TensorBoard in this process, on a free port, and return its address."""
    from tensorboard import program

    tensorboard = program.TensorBoard()
    tensorboard.configure(logdir=str(logdir), host="127.0.0.1", port=0)
    return tensorboard.launch()


@contextlib.contextmanager
def headless_browser() -> Iterator[Any]:
    """Start the installed Chromium or Chrome. Raises UsageError if it, its driver or selenium is not installed."""
    try:
        from selenium import webdriver
    except ModuleNotFoundError:
        raise UsageError("selenium is not installed; needed here: pip install '.[browser]'") from None
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        raise UsageError(
            "Chromium and its driver are not installed; on Debian: apt-get install chromium chromium-driver"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in FLAGS:
        options.add_argument(flag)
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()


def loads(browser: Any, address: str, shows: Callable[[Any], bool]) -> bool:
    """Load a page and return whether it passes the test in time."""
    browser.get("about:blank")  # otherwise the browser would only move to another anchor of the same page
    browser.get(address)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not shows(browser):
        if time.monotonic() > deadline:
            return False
        time.sleep(1)
    return True


def main() -> None:
    arguments = cli.parse(ScreenshotArguments)
    logdir, output = Path(arguments.logdir), Path(arguments.output)
    if not any(logdir.rglob("events.out.tfevents.*")):
        raise UsageError(f"--logdir: {logdir} holds no TensorBoard files")
    with headless_browser() as browser:
        address = serve(logdir)
        output.mkdir(parents=True, exist_ok=True)
        for name, (page, shows) in TABS.items():
            if not any(loads(browser, address + page, shows) for _ in range(ATTEMPTS)):
                raise RunError(f"{name}: shows nothing after {ATTEMPTS * TIMEOUT_SECONDS} seconds")
            time.sleep(DRAWING_SECONDS)
            browser.save_screenshot(str(output / f"{name}.png"))
            print(output / f"{name}.png")


if __name__ == "__main__":
    cli.run(main)
