"""A headless Chromium for tests, driven through chromedriver's own HTTP interface: no package."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
DRIVER = shutil.which("chromedriver")
MISSING = None if CHROMIUM and DRIVER else "chromium and chromedriver are not installed"
_PATIENCE = 20.0
"""Seconds that a browser may take to answer before a test gives up on it."""


class Browser:
    """One window. What runs in the page is awaited; JavaScript errors are collected."""

    def __init__(self, session: str) -> None:
        self._session = session

    def open(self, page: Path, fragment: str = "") -> None:
        self.post("url", {"url": page.resolve().as_uri() + fragment})

    def run(self, script: str, *arguments: Any) -> Any:
        """What the body of a function gives that runs in the page; a promise is awaited."""
        return self.post("execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, condition: str) -> Any:
        """The first true value of an expression. Raises AssertionError where none comes."""
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end:
            if found := self.run(f"return {condition}"):
                return found
            time.sleep(0.05)
        raise AssertionError(f"never true: {condition}")

    def complaints(self) -> list[str]:
        """Errors and refusals of the console since they were last asked for."""
        told = self.post("se/log", {"type": "browser"})
        return [entry["message"] for entry in told if entry["level"] in ("SEVERE", "WARNING")]

    def show_as(
        self, width: int, height: int, scheme: str = "light", media: str = "screen"
    ) -> None:
        self.tell(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 700,
        )  # fmt: skip
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.tell("Emulation.setEmulatedMedia", media=media, features=[feature])

    def screenshot(self, out: Path, *, whole: bool = False) -> None:
        found = self.tell("Page.captureScreenshot", captureBeyondViewport=whole)
        out.write_bytes(base64.b64decode(found["data"]))

    def tell(self, command: str, **parameters: Any) -> Any:
        """A command of the DevTools protocol."""
        return self.post("goog/cdp/execute", {"cmd": command, "params": parameters})

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return _ask("POST", f"{self._session}/{path}", body)


@contextmanager
def browser() -> Iterator[Browser]:
    """A new browser, closed at the end. Needs ``MISSING`` to be None."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert DRIVER is not None
    driver = subprocess.Popen([DRIVER, f"--port={port}", "--log-level=OFF"])
    try:
        root = f"http://127.0.0.1:{port}"
        _started(root)
        options = {
            "binary": CHROMIUM,
            "args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1440,900"],
        }
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        made = _ask("POST", f"{root}/session", {"capabilities": {"alwaysMatch": wanted}})
        session = f"{root}/session/{made['sessionId']}"
        yield Browser(session)
        _ask("DELETE", session)
    finally:
        driver.terminate()
        driver.wait()


def _started(root: str) -> None:
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        try:
            if _ask("GET", f"{root}/status")["ready"]:
                return
        except urllib.error.URLError:
            time.sleep(0.05)
    raise AssertionError("chromedriver does not start")


def _ask(method: str, url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=_PATIENCE) as reply:
            return json.load(reply)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(json.load(error)["value"]["message"]) from None
