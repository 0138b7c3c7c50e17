"""The page in a real browser, beside real training. Needs Debian's chromium and chromium-driver."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dptrain.service.page.runs import Runs
from tests.cli.conftest import PROGRAM, environment
from tests.service.page.conftest import Served, Steered, Tokens

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no browser here: apt-get install chromium chromium-driver"
)

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
LIVE = {"DPTRAIN_OUTPUT__JOURNAL_STEPS": "1", "DPTRAIN_TRAIN__EPOCHS": "100000", "DPTRAIN_NAME": "live"}


class Browser:
    """Chromium with a profile of its own. ``load`` opens a page; ``until`` waits for what a script gives."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def load(self, address: str) -> None:
        self.driver.get(address)

    def script(self, code: str) -> Any:
        return self.driver.execute_script(f"return {code}")

    def until(self, code: str, seconds: float = 90) -> Any:
        ends = time.monotonic() + seconds
        while True:
            found = self.script(code)
            if found:
                return found
            assert time.monotonic() < ends, (
                f"{code} stayed {found!r}; the page: {self.script('document.body.innerText')}"
            )
            time.sleep(0.1)

    def key(self, key: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(key).perform()

    def click(self, selector: str) -> None:
        from selenium.webdriver.common.by import By

        self.until(f"document.querySelector({selector!r})")
        self.driver.find_element(By.CSS_SELECTOR, selector).click()

    def size(self, width: int, height: int, *, dark: bool = False) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def complaints(self) -> list[str]:
        """What the browser's console says of errors: scripts, policy, requests."""
        return [line["message"] for line in self.driver.get_log("browser") if line["level"] == "SEVERE"]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    from selenium.webdriver import Chrome
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=Service(str(DRIVER)))
    yield Browser(driver)
    driver.quit()


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    chromium.size(1440, 900)
    chromium.complaints()
    yield chromium
    chromium.load("about:blank")
    chromium.driver.delete_all_cookies()


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Path]:
    """A folder in which a real job trains until the test ends."""
    runs = tmp_path / "runs"
    command = [*PROGRAM, "run", "--run-dir", str(runs / "live"), "--progress", "none"]
    env = environment() | {"DPTRAIN_CACHE": str(tmp_path / "cache")} | LIVE
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        while not (runs / "live" / "journal.jsonl").exists():
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.1)
        yield runs
    finally:
        os.kill(process.pid, signal.SIGTERM)
        process.communicate(timeout=120)


def test_curves_move_while_a_job_trains(browser: Browser, training: Path, served: Served) -> None:
    browser.load(served(Runs(training)).address)
    state = "document.querySelector('.pill')?.innerText"
    browser.until(f"{state} === 'Running'")
    assert "live" in browser.until("document.querySelector('#list .name')?.innerText")
    told = "document.querySelector('.progress .row span')?.innerText"
    step = f"Number({told}.match(/step ([0-9,]+)/)?.[1].replaceAll(',', ''))"
    first = browser.until(f"{step} > 0 && {step}")
    assert browser.until(f"{step} > {first} && {step}") > first
    ink = "document.querySelector('.chart canvas')?.toDataURL()"
    before = browser.until(ink)
    browser.until(f"{ink} !== {before!r}")
    assert browser.script("document.querySelector('#live').className") == "live on"
    assert browser.until("document.querySelectorAll('.worker').length") == 1
    browser.until("document.querySelector('#eta').innerText.includes('left')")
    assert browser.complaints() == []


def test_keys_lead_everywhere(browser: Browser, runs: Path, served: Served) -> None:
    browser.load(served(Runs(runs)).address)
    here = "decodeURIComponent(location.hash)"
    browser.until(f"{here}.startsWith('#/job/')")
    first = browser.script(here)
    browser.key("j")
    browser.until(f"{here} !== {first!r}")
    browser.key("x")
    browser.key("k")
    browser.until(f"{here} === {first!r}")
    browser.key("x")
    browser.until("!document.querySelector('#overlay').hidden")
    for key, found in (("2", ".lines div"), ("3", ".toml .h"), ("4", "td a[download]"), ("1", ".chart canvas")):
        browser.key(key)
        browser.until(f"document.querySelector({found!r})")
    browser.key("o")
    browser.until("document.querySelectorAll('main tbody tr').length === 2")
    browser.until("document.querySelector('main .badge')?.innerText === 'different weights'")
    browser.key("/")
    assert browser.script("document.activeElement.id") == "find"
    browser.key("two")
    browser.until("document.querySelectorAll('#list .job').length === 1")
    assert browser.complaints() == []


def test_what_a_job_says_is_never_markup(browser: Browser, runs: Path, served: Served) -> None:
    browser.load(served(Runs(runs)).address + "/#/job/one")
    assert browser.until("document.querySelector('h1')?.innerText") == 'job <one> & "more"'


def test_light_dark_and_narrow(browser: Browser, runs: Path, served: Served) -> None:
    browser.size(390, 844, dark=True)
    browser.load(served(Runs(runs)).address)
    browser.until("document.querySelector('#list .job')")
    ground = "getComputedStyle(document.body).backgroundColor"
    assert browser.script(ground) == "rgb(16, 18, 19)"
    assert browser.script("getComputedStyle(document.querySelector('main')).display") == "none"
    browser.click("#list .job a")
    browser.until("document.querySelector('.chart canvas')")
    assert browser.script("getComputedStyle(document.querySelector('nav')).display") == "none"
    for path in ("curves", "log", "config", "files"):
        browser.script(f"void (location.hash = '#/job/one/{path}')")
        browser.until(f"document.querySelector('#tab-{path}')?.getAttribute('aria-selected') === 'true'")
        assert browser.script("document.documentElement.scrollWidth <= innerWidth")
    browser.click("#theme")
    assert browser.script(ground) == "rgb(245, 244, 241)"
    browser.script("localStorage.clear()")
    browser.click(".back")
    browser.until("getComputedStyle(document.querySelector('nav')).display !== 'none'")
    assert browser.complaints() == []


def test_a_token_opens_the_page_and_steers_a_job(browser: Browser, runs: Path, served: Served) -> None:
    reading = Steered(runs)
    address = served(reading, door=Tokens()).address
    browser.load(address + "/#/job/one")
    browser.until("document.querySelector('#login').open")
    browser.until("document.activeElement.id === 'token'")
    browser.key("wrong\ue007")
    browser.until("document.querySelector('#wrong').innerText.includes('nobody has this token')")
    browser.script("document.querySelector('#token').value = ''")
    browser.click("#token")
    browser.key("t-submit\ue007")
    browser.until("!document.querySelector('#login').open")
    browser.click("#do-cancel")
    browser.until("document.querySelector('#ask').open")
    browser.click("#ask button[value=no]")
    assert reading.asked == []
    browser.click("#do-pause")
    browser.until("document.querySelector('.pill').innerText === 'Paused'")
    assert reading.asked == [("submit", "one", "pause")]
    assert "t-submit" not in browser.script("location.href")
    assert browser.script("document.cookie") == ""
    # The refused tokens are all that the console may speak of.
    assert all("401" in line for line in browser.complaints())
    browser.click("#leave")
    browser.until("document.querySelector('#login').open")


def test_a_page_finds_its_way_back(browser: Browser, runs: Path, served: Served) -> None:
    server = served(Runs(runs))
    browser.load(server.address)
    browser.until("document.querySelector('#live').className === 'live on'")
    server.close()
    browser.until("document.querySelector('#live').className === 'live off'")
    served(Runs(runs), port=server.port)
    browser.until("document.querySelector('#live').className === 'live on'")


def test_the_first_view_is_light_and_all_from_here(browser: Browser, runs: Path, served: Served) -> None:
    address = served(Runs(runs)).address
    browser.load(address)
    browser.until("document.querySelector('.chart canvas')")
    entries = browser.script("performance.getEntriesByType('resource').map((e) => [e.name, e.transferSize])")
    assert all(name.startswith(address) for name, _ in entries)
    own = browser.script("performance.getEntriesByType('navigation')[0].transferSize")
    assert 60_000 < own + sum(size for _, size in entries) < 300_000


def test_a_broken_policy_would_be_seen(browser: Browser, runs: Path, served: Served) -> None:
    browser.load(served(Runs(runs)).address)
    browser.script("void document.head.append(Object.assign(document.createElement('style'), {textContent: 'a{}'}))")
    assert any("Content Security Policy" in line for line in browser.complaints())
