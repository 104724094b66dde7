"""A real headless Chromium, driven through its debugging pipe: no other package is needed for it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe"),
)


@dataclass
class Seen:
    """What a browser made of a page.

    Attributes:
        messages: Of the console, errors of the page and of its loading among them.
        requests: All URLs that were asked for.
        picture: The page as a PNG, from its top to its end.
        overflow: By how many pixels it is wider than the window.
        values: Of the expressions that were asked for.
    """

    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    picture: bytes = b""
    overflow: int = 0
    values: list[Any] = field(default_factory=list)


class Browser:
    """Opens pages."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._out, self._in = to_browser, os.fdopen(from_browser, "rb")
        self._buffer = b""
        self._number = 0
        self._events: list[dict[str, Any]] = []
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = ""
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")

    def look(self, page: Path, width: int, dark: bool, *expressions: str, picture: bool = True) -> Seen:
        """Open a file.

        Args:
            page: The file.
            width: Of the window.
            dark: Whether the reader prefers dark colours.
            expressions: JavaScript, whose values are told; a promise is waited for.
            picture: Whether a picture is taken, after the expressions.
        """
        self._events.clear()
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])
        self._set_size(width, 900)
        answer = self._ask("Page.navigate", url=page.resolve().as_uri())
        assert "errorText" not in answer, f"{page}: {answer['errorText']}"
        self._wait_for("Page.loadEventFired")
        overflow = self._value("document.documentElement.scrollWidth") - width
        values = [self._value(expression) for expression in expressions]
        png = self._picture(width) if picture else b""
        return Seen(self._messages(), self._requests(), png, overflow, values)

    def _picture(self, width: int) -> bytes:
        self._set_size(width, min(self._value("document.documentElement.scrollHeight"), 8000))
        return base64.b64decode(self._ask("Page.captureScreenshot", format="png")["data"])

    def _set_size(self, width: int, height: int) -> None:
        self._ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )

    def _value(self, expression: str) -> Any:
        answer = self._ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        return answer["result"].get("value")

    def _messages(self) -> list[str]:
        names = {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"}
        return [json.dumps(event["params"]) for event in self._events if event["method"] in names]

    def _requests(self) -> list[str]:
        return [e["params"]["request"]["url"] for e in self._events if e["method"] == "Network.requestWillBeSent"]

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        command: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if getattr(self, "_session", ""):
            command["sessionId"] = self._session
        os.write(self._out, json.dumps(command).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._events.append(answer)

    def _wait_for(self, method: str) -> None:
        while all(event["method"] != method for event in self._events):
            self._events.append(self._read())

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            more = self._in.read1(65536)
            assert more, "the browser is gone"
            self._buffer += more
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser of its own, with a profile of its own."""
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [str(CHROMIUM), *_FLAGS, f"--user-data-dir={profile}"]
        shell = f'exec "$@" 3<&{to_read} 4>&{from_write}'
        process = subprocess.Popen(
            ["bash", "-c", shell, "chromium", *command], pass_fds=(to_read, from_write), stderr=subprocess.DEVNULL
        )
        os.close(to_read)
        os.close(from_write)
        try:
            yield Browser(to_write, from_read)
        finally:
            process.terminate()
            process.wait()
            os.close(to_write)
