"""The page's first view: from the address to curves, in headless Chromium, over the runs of a folder.

Needs Debian's chromium and chromium-driver, and selenium (extra ``test``).
"""

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import dptrain
from bench import report
from bench.interleave import interleaved, spread
from bench.options import Options
from bench.spawn import Found, NotRun
from dptrain.service.page.runs import Runs
from dptrain.service.page.server import PageServer

RUNS = 20
JOB: dict[str, Any] = {
    "data": {"source": "digits"},
    "model": {"layers": [{"type": "linear", "units": 10}]},
    "train": {"epochs": 30, "batch_size": 64},
    "output": {"journal_steps": 1},
}
NAMES = {"list": "to the list of jobs, ms", "curves": "to the first curve, ms", "bytes": "sent, kB"}
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--window-size=1440,900",
)


def main(options: Options) -> None:
    """Leaves page.json and .md."""
    with tempfile.TemporaryDirectory(prefix="dptrain-bench-") as folder:
        first = Path(folder) / "runs" / "0"
        dptrain.train(JOB, run_dir=first)
        for i in range(1, RUNS):
            shutil.copytree(first, first.parent / str(i))
        server = PageServer(Runs(first.parent))
        try:
            measured = interleaved({"page": lambda repeat: _first_view(server.address)}, options.repeats, "page")
        finally:
            server.close()
    content: dict[str, Any] = {}
    rows = []
    for key, name in NAMES.items():
        values = measured["page"].values(key)
        if not values:
            rows.append(report.not_run(name, measured["page"].reason, 2))
            continue
        figures = spread(values)
        content[key] = {**figures, "runs": values}
        rows.append([name, f"{figures['median']:.0f} ({figures['lowest']:.0f} to {figures['highest']:.0f})"])
    settings = {"repeats": options.repeats, "runs": RUNS}
    title = f"The page's first view, {RUNS} runs, nothing cached"
    report.write(options.results, "page", title, settings, {"page": content}, report.table(["", ""], rows))


def _first_view(address: str) -> Found:
    """Times by the browser's own clock, from its navigation's start, with a profile that knows nothing."""
    try:
        from selenium.webdriver import Chrome
        from selenium.webdriver.chrome.options import Options as ChromeOptions
        from selenium.webdriver.chrome.service import Service
    except ModuleNotFoundError:
        raise NotRun("selenium is not installed") from None
    driver_path, browser = shutil.which("chromedriver"), shutil.which("chromium")
    if not driver_path or not browser:
        raise NotRun("no chromium and chromedriver")
    with tempfile.TemporaryDirectory(prefix="dptrain-bench-", ignore_cleanup_errors=True) as profile:
        chrome = ChromeOptions()
        chrome.binary_location = browser
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            chrome.add_argument(flag)
        driver = Chrome(options=chrome, service=Service(driver_path))
        try:
            driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": _WATCH})
            driver.get(address)
            until = time.monotonic() + 60
            while not (seen := driver.execute_script("return window.seen.curves && window.seen")):
                if time.monotonic() > until:
                    raise NotRun("no curve after a minute")
                time.sleep(0.02)
            size = driver.execute_script(_BYTES)
        finally:
            driver.quit()
    return {"list": float(seen["list"]), "curves": float(seen["curves"]), "bytes": size / 1000}


_WATCH = """
window.seen = {};
const look = () => {
  if (!seen.list && document.querySelector('#list .job')) seen.list = performance.now();
  if (!seen.curves && document.querySelector('.chart canvas')) seen.curves = performance.now();
  if (!seen.curves) requestAnimationFrame(look);
};
look();
"""
_BYTES = """
const all = [...performance.getEntriesByType('resource'), ...performance.getEntriesByType('navigation')];
return all.reduce((sum, entry) => sum + entry.transferSize, 0);
"""
