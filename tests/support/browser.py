"""A headless browser for tests: Debian's Chromium, driven through WebDriver with the standard library alone."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
).split()


class Browser:
    """A session of chromedriver at that address."""

    def __init__(self, address: str):
        self.address = address
        options = {"args": FLAGS, "binary": shutil.which("chromium")}
        wanted = {"capabilities": {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}}
        self.session = self._call("POST", "/session", wanted)["sessionId"]

    def _call(self, method: str, path: str, given: dict[str, Any] | None = None) -> Any:
        body = None if given is None else json.dumps(given).encode()
        request = urllib.request.Request(self.address + path, body, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, address: str, width: int = 1280, height: int = 800) -> None:
        self._call("POST", f"/session/{self.session}/window/rect", {"width": width, "height": height})
        self._call("POST", f"/session/{self.session}/url", {"url": address})

    def run(self, script: str) -> Any:
        """What the JavaScript returns."""
        return self._call("POST", f"/session/{self.session}/execute/sync", {"script": script, "args": []})

    def wait_for(self, condition: str, seconds: float = 60) -> None:
        """Wait until the JavaScript expression is true; fails with the page's text if it never is."""
        end = time.monotonic() + seconds
        while not self.run(f"return Boolean({condition})"):
            assert time.monotonic() < end, f"{condition} is not true of: {self.run('return document.body.innerText')}"
            time.sleep(0.2)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", f"/session/{self.session}/screenshot")))

    def close(self) -> None:
        self._call("DELETE", f"/session/{self.session}")


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser; the test is skipped where chromium or chromedriver is not installed."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed (Debian: chromium, chromium-driver)")
    port = free_port()
    driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until_open(port)
        session = Browser(f"http://127.0.0.1:{port}")
        try:
            yield session
        finally:
            session.close()
    finally:
        driver.terminate()
        driver.wait(10)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def wait_until_open(port: int, seconds: float = 60) -> None:
    """Wait until something listens on that port of this machine."""
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert time.monotonic() < end, f"nothing listens on port {port}"
            time.sleep(0.1)
