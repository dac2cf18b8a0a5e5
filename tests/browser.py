"""A headless Chromium driven through its DevTools protocol over a pipe: what the tests of pages need, no more.

https://chromedevtools.github.io/devtools-protocol/: JSON messages, each ended by a zero byte, in at descriptor 3, out at 4.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find() -> str | None:
    """The first Chromium on PATH."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page of a Chromium of its own; `with Browser(program) as page`. Every message it did not ask for is in `events`."""

    def __init__(self, program: str, timeout: float = 60.0) -> None:
        self.timeout, self.number, self.events, self.rest = timeout, 0, [], b""
        self.events: list[dict[str, Any]]
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        give, take = os.pipe(), os.pipe()
        self.write, self.read = give[1], take[0]
        # The shell puts the ends where Chromium looks for them, whatever numbers they have here.
        script = f'exec "$0" "$@" 3<&{give[0]} 4>&{take[1]}'
        flags = (
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions",
            "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--remote-debugging-pipe",
            f"--user-data-dir={self.profile.name}", "about:blank",
        )  # fmt: skip
        self.process = subprocess.Popen(
            ["bash", "-c", script, program, *flags], pass_fds=(give[0], take[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(give[0])
        os.close(take[1])
        self.session = ""

    def __enter__(self) -> Browser:
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self.write)
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.read)
        self.profile.cleanup()

    def call(self, method: str, **parameters: Any) -> Any:
        """The result of a command. Raises RuntimeError for an error, TimeoutError without an answer."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + self.timeout
        while True:
            found = self._receive(until)
            if found.get("id") == self.number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']}")
                return found["result"]
            self.events.append(found)

    def _receive(self, until: float) -> dict[str, Any]:
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.read], [], [], max(0.0, until - time.monotonic()))
            data = os.read(self.read, 1 << 20) if ready else b""
            if not data:
                raise TimeoutError("Chromium did not answer" if not ready else "Chromium ended")
            self.rest += data
        message, _, self.rest = self.rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def show(self, address: str, width: int, height: int = 900, dark: bool = False) -> None:
        """Loads a page at a window size and an appearance, and waits until it is there."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.appear(dark)
        self.events = []
        self.call("Page.navigate", url=address)
        until = time.monotonic() + self.timeout
        while self.evaluate("document.readyState") != "complete" or self.evaluate("location.href") != address:
            if time.monotonic() > until:
                raise TimeoutError(f"Chromium did not load {address}")
            time.sleep(0.02)

    def appear(self, dark: bool) -> None:
        """Light or dark, as a reader's system would say."""
        scheme = "dark" if dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{script[:80]}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def picture(self, path: Path, whole: bool = True) -> Path:
        """A screenshot (PNG) of the whole page or of the window."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
        return path
