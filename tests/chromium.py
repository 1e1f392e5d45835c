"""Headless Chromium for tests of pages, driven over its debugging pipe; nothing it asks for leaves the machine."""

import asyncio
import base64
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from waiting import PATIENCE_S

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--remote-debugging-pipe",
)

_START = """
import fcntl, os, sys
given = [fcntl.fcntl(int(each), fcntl.F_DUPFD, 10) for each in sys.argv[1:3]]
for want, each in zip((3, 4), given):
    os.dup2(each, want)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Chromium reads its debugging pipe at descriptor 3 and writes at 4."""


class PageError(Exception):
    """A script of the test raised in the page."""


class Page:
    """One tab. ``asked`` has the URLs of all that the page tried to load, ``problems`` its errors and warnings."""

    def __init__(self, browser: "Browser", session: str) -> None:
        self._browser = browser
        self._session = session
        self.asked: list[str] = []
        self.problems: list[str] = []
        self.loaded = asyncio.Event()

    async def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol."""
        return await self._browser.send(method, parameters, self._session)

    async def open(self, url: str, *, width: int = 1280, height: int = 800, is_dark: bool = False) -> None:
        """Show a page; return once it has loaded."""
        for domain in ("Page", "Runtime", "Network", "Log"):
            await self.send(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        await self.send("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        await self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.loaded.clear()
        await self.send("Page.navigate", url=url)
        await self.loaded.wait()

    async def run(self, script: str) -> Any:
        """Return the value of an expression in the page, awaited. Raises PageError."""
        found = await self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            details = found["exceptionDetails"]
            raise PageError(details.get("exception", {}).get("description", details["text"]))
        return found["result"].get("value")

    async def until(self, script: str) -> Any:
        """Return the value of an expression once it is true."""
        while not (value := await self.run(script)):
            await asyncio.sleep(0.02)
        return value

    async def press(self, key: str, *, modifiers: int = 0) -> None:
        """Press a key, by its name in JavaScript."""
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            more = text if kind == "keyDown" else {}
            await self.send("Input.dispatchKeyEvent", type=kind, key=key, modifiers=modifiers, **more)

    async def screenshot(self) -> bytes:
        """Return what is seen as a PNG."""
        found = await self.send("Page.captureScreenshot", format="png")
        return base64.b64decode(found["data"])

    def told(self, method: str, parameters: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self.loaded.set()
        elif method == "Network.requestWillBeSent":
            self.asked.append(parameters["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.problems.append(parameters["entry"]["text"])


class Browser:
    """A running Chromium."""

    def __init__(self, reader: asyncio.StreamReader, writer: Any) -> None:
        self._reader, self._writer = reader, writer
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._pages: dict[str, Page] = {}

    async def page(self) -> Page:
        """Return a new tab."""
        target = await self.send("Target.createTarget", {"url": "about:blank"})
        session = await self.send("Target.attachToTarget", {"targetId": target["targetId"], "flatten": True})
        page = self._pages[session["sessionId"]] = Page(self, session["sessionId"])
        return page

    async def send(self, method: str, parameters: dict[str, Any], session: str = "") -> dict[str, Any]:
        number = next(self._ids)
        message = {"id": number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self._writer.write(json.dumps(message).encode() + b"\0")
        return await answer

    async def read(self) -> None:
        try:
            while True:
                message = json.loads((await self._reader.readuntil(b"\0"))[:-1])
                if (number := message.get("id")) is None:
                    if (page := self._pages.get(message.get("sessionId", ""))) is not None:
                        page.told(message["method"], message["params"])
                elif (answer := self._answers.pop(number, None)) is not None and not answer.done():
                    if "error" in message:
                        answer.set_exception(PageError(message["error"]["message"]))
                    else:
                        answer.set_result(message["result"])
        except asyncio.IncompleteReadError:
            for answer in self._answers.values():
                if not answer.done():
                    answer.set_exception(PageError("the browser has ended"))


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """Run a browser with an empty profile."""
    assert CHROMIUM is not None
    loop = asyncio.get_running_loop()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        (its_in, our_out), (our_in, its_out) = os.pipe(), os.pipe()
        command = (sys.executable, "-S", "-c", _START, str(its_in), str(its_out), CHROMIUM, *_FLAGS)
        process = await asyncio.create_subprocess_exec(
            *command,
            f"--user-data-dir={profile}",
            "about:blank",
            pass_fds=(its_in, its_out),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(its_in)
        os.close(its_out)
        reader = asyncio.StreamReader(limit=1 << 28)
        incoming, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(our_in, "rb")
        )
        outgoing, _ = await loop.connect_write_pipe(asyncio.Protocol, os.fdopen(our_out, "wb"))
        browser = Browser(reader, outgoing)
        reading = loop.create_task(browser.read())
        try:
            yield browser
        finally:
            # Closing the pipe ends it; its helpers end with it.
            outgoing.close()
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await process.wait()
            except TimeoutError:
                os.killpg(process.pid, 9)
                await process.wait()
            await reading
            incoming.close()
