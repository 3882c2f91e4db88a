"""A headless Chromium, driven over a pipe with the DevTools protocol: no driver, no port."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_NAMES = ("chromium", "chromium-browser", "google-chrome")
PROGRAM = next((path for path in map(shutil.which, _NAMES) if path), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip

# Chromium talks on descriptors 3 and 4: put the pipes there, then become Chromium.
_BECOME = (
    "import fcntl, os, sys\n"
    "high = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]\n"
    "os.dup2(high[0], 3); os.dup2(high[1], 4)\n"
    "os.execv(sys.argv[3], sys.argv[3:])\n"
)


@dataclass
class Visit:
    """What happened while a page was open."""

    session: str
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


class Browser:
    """A browser process; use it as a context manager."""

    def __enter__(self) -> Self:
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        profile = f"--user-data-dir={self._profile.name}"
        words = [PROGRAM or "chromium", *FLAGS, profile, "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BECOME, str(theirs_in), str(theirs_out), *words],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._number, self._rest = 0, b""
        self._visits: dict[str, Visit] = {}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.send("Browser.close")
            self._process.wait(10)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._in)
            os.close(self._out)
            self._profile.cleanup()

    def send(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result; what happens meanwhile is noted."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            command["sessionId"] = session
        os.write(self._out, json.dumps(command).encode() + b"\0")
        while True:
            message = self._read()
            if message.get("id") == self._number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                result: dict[str, Any] = message["result"]
                return result
            self._note(message)

    def open(self, page: Path, *, width: int, height: int = 900, dark: bool = False) -> Visit:
        """Open a file in a window of this size and theme, and wait until it is drawn."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        visit = self._visits[session] = Visit(session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable", session)
        self.send(
            "Emulation.setDeviceMetricsOverride", session,
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", session, features=[scheme])
        self.send("Page.navigate", session, url=page.resolve().as_uri())
        ready = (
            "new Promise(done => { const look = () => document.readyState === 'complete' && "
            f"location.href === {json.dumps(page.resolve().as_uri())} "
            "? requestAnimationFrame(() => done(true)) : setTimeout(look, 10); look() })"
        )
        for _ in range(3):  # the context may be replaced while the page comes
            try:
                self.evaluate(visit, ready)
                break
            except RuntimeError:
                continue
        return visit

    def evaluate(self, visit: Visit, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        found = self.send(
            "Runtime.evaluate", visit.session,
            expression=expression, returnByValue=True, awaitPromise=True,
        )  # fmt: skip
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"]))
        return found["result"].get("value")

    def screenshot(
        self, visit: Visit, *, top: float = 0, height: float | None = None, scale: float = 1
    ) -> bytes:
        """Return a PNG of the page, or of a part of it."""
        size = self.send("Page.getLayoutMetrics", visit.session)["cssContentSize"]
        high = size["height"] - top if height is None else min(height, size["height"] - top)
        clip = {"x": 0, "y": top, "width": size["width"], "height": high, "scale": scale}
        shot = self.send(
            "Page.captureScreenshot", visit.session,
            format="png", clip=clip, captureBeyondViewport=True,
        )  # fmt: skip
        return base64.b64decode(shot["data"])

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = os.read(self._in, 1 << 20)
            if not piece:
                raise RuntimeError("Chromium has gone")
            self._rest += piece
        message, self._rest = self._rest.split(b"\0", 1)
        read: dict[str, Any] = json.loads(message)
        return read

    def _note(self, message: dict[str, Any]) -> None:
        visit = self._visits.get(message.get("sessionId", ""))
        if visit is None:
            return
        method, told = message["method"], message["params"]
        if method == "Network.requestWillBeSent":
            visit.requests.append(told["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            visit.errors.append(str(told["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled":
            visit.errors.append(str(told["args"]))
        elif method == "Log.entryAdded":
            visit.errors.append(told["entry"]["text"])
