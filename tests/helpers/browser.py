"""The system's Chromium, without a window, driven by Selenium."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DRIVERS = ("chromedriver", "chromium-driver")
TIMEOUT = 60  # seconds until a page must be drawn; it takes one, on a machine that is not busy
# Without a sandbox, which root and containers do not have: the pages are our own.
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")


def _first(names: tuple[str, ...]) -> str | None:
    return next((place for name in names if (place := shutil.which(name))), None)


def missing() -> str:
    """Return what a test with a browser lacks here; empty if nothing."""
    if not _first(BROWSERS):
        return f"no browser is installed (apt-get install chromium): none of {', '.join(BROWSERS)}"
    if not _first(DRIVERS):
        return "no chromedriver is installed (apt-get install chromium-driver)"
    return ""


class Browser:
    """A browser with one page, what it said on its console, and what it asked a network for."""

    def __init__(self, driver: Any):
        self.driver = driver

    def open(self, page: Path, *, width: int = 1280, dark: bool = False) -> None:
        """Open a page, and return when it is drawn."""
        self.show_as(width=width, dark=dark)
        self.messages(), self.requests()  # those of the page before
        self.driver.get(page.as_uri())
        self.wait()

    def show_as(self, *, width: int, dark: bool) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def wait(self) -> None:
        """Return when what was chosen last is drawn."""
        end = time.monotonic() + TIMEOUT
        while (state := self.run("return document.body.dataset.state")) != "ready":
            # Without a state no script of the page has begun: its text is not JavaScript.
            late, messages = time.monotonic() > end, [] if state else self.messages()
            if late or messages or state == "failed":
                raise AssertionError(state, messages or self.messages())
            time.sleep(0.02)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def click(self, selector: str, number: int = 0) -> None:
        """Click on an element as a mouse does, and return when the page has answered."""
        from selenium.webdriver.common.action_chains import ActionChains

        element = self.all(selector)[number]
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        ActionChains(self.driver).move_to_element(element).click().perform()
        self.wait()

    def press(self, *keys: str) -> None:
        """Press keys, wherever the focus is."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()
        self.wait()

    def messages(self) -> list[str]:
        """Return what stands on the console since the last call."""
        return [f"{entry['level']}: {entry['message']}" for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Return the addresses of everything that was loaded since the last call."""
        events = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        sent = [
            e["params"]["request"] for e in events if e["method"] == "Network.requestWillBeSent"
        ]
        return [request["url"] for request in sent]


@contextmanager
def started() -> Iterator[Browser]:
    """Start a browser for a while; :func:`missing` says beforehand whether there is one."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = _first(BROWSERS)
    for option in OPTIONS:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(_first(DRIVERS)))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
