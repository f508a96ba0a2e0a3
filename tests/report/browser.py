"""Drives a headless Chromium over its DevTools pipe, with nothing but the standard library."""

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SWITCHES = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
# Chromium reads commands from descriptor 3 and writes to 4; this hands ours over under those numbers.
LAUNCHER = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)


def find_chromium() -> str:
    """The browser's path; skips the test where there is none, unless this is CI, where that is a failure."""
    wanted = os.environ.get("CHROMIUM")
    found = wanted or next((path for name in NAMES if (path := shutil.which(name))), None)
    if found:
        return found
    message = "no Chromium found: install Debian's `chromium` or set CHROMIUM to a browser's path"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


class Page:
    """One tab. Everything the page said or asked for is gathered in `messages` and `requests`."""

    def __init__(self, commands: int, replies: int) -> None:
        self._commands, self._replies = commands, replies
        self._buffer = b""
        self._ids = itertools.count(1)
        self._session: str | None = None
        self.messages: list[str] = []
        self.requests: list[str] = []
        self._loaded = False
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._read()
            if reply.get("id") == number:
                assert "error" not in reply, f"{method}: {reply['error']}"
                return reply["result"]

    def _read(self, seconds: float = 30) -> dict[str, Any]:
        until = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._replies], [], [], max(0, until - time.monotonic()))
            assert ready, "Chromium does not answer"
            chunk = os.read(self._replies, 1 << 20)
            assert chunk, "Chromium has ended"
            self._buffer += chunk
        raw, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(raw)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, event: str, params: dict[str, Any]) -> None:
        if event == "Runtime.consoleAPICalled":
            self.messages.append(f"{params['type']}: {params['args']}")
        elif event == "Runtime.exceptionThrown":
            self.messages.append(f"exception: {params['exceptionDetails']}")
        elif event == "Log.entryAdded":
            self.messages.append(f"log: {params['entry']['text']}")
        elif event == "Page.javascriptDialogOpening":
            self.messages.append(f"dialog: {params['message']}")
        elif event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event == "Page.loadEventFired":
            self._loaded = True

    def evaluate(self, expression: str) -> Any:
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float = 15) -> None:
        until = time.monotonic() + seconds
        while not self.evaluate(expression):
            assert time.monotonic() < until, f"never became true: {expression}"
            time.sleep(0.05)

    def open(self, path: Path) -> None:
        self.visit(path.resolve().as_uri())

    def visit(self, url: str) -> None:
        self._loaded = False
        self.send("Page.navigate", url=url)
        while not self._loaded:
            self._read()

    def size(self, width: int, height: int) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def scheme(self, value: str) -> None:
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    def settle(self) -> None:
        """Wait until two frames have been painted, so that what observers do at the next frame is done."""
        frames = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 0))))"
        self.evaluate(frames)

    def scroll_through(self) -> None:
        """Move down the page screen by screen, as a reader does, and back to the top."""
        top, step = 0, int(self.evaluate("window.innerHeight"))
        while top < self.evaluate("document.documentElement.scrollHeight"):
            top += step
            self.evaluate(f"window.scrollTo({{ top: {top}, behavior: 'instant' }})")
            self.settle()
        self.evaluate("window.scrollTo({ top: 0, behavior: 'instant' })")
        self.settle()

    def screenshot(self, path: Path) -> None:
        image = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(image))


@contextmanager
def chromium(profile: Path, *switches: str) -> Iterator[Page]:
    """A fresh headless browser with one empty tab, with further switches; ended with the block."""
    ends = []
    for _ in range(2):
        # Above 10, so that putting them at 3 and 4 can never overwrite one with the other.
        pair = os.pipe()
        ends += [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in pair]
        for end in pair:
            os.close(end)
    command_read, command_write, reply_read, reply_write = ends
    arguments = [find_chromium(), *SWITCHES, *switches, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(command_read), str(reply_write), *arguments],
        pass_fds=(command_read, reply_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(command_read)
    os.close(reply_write)
    try:
        yield Page(command_write, reply_read)
    finally:
        os.close(command_write)  # Chromium ends when its pipe closes
        os.close(reply_read)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
