"""Writing to standard output in a thread: a reader that is slow, or has stopped, must not stop the loop with it.

The nodes would take a loop that stands still for one that hangs, and cut it off.
"""

import asyncio
import os
import queue
import select
import sys
import threading


class Output:
    """Writes texts to a descriptor, each before the next one is taken."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._texts: queue.SimpleQueue[tuple[bytes, asyncio.Future[None]]] = queue.SimpleQueue()
        self._encoding = sys.stdout.encoding or "utf-8"
        self._last: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        # A daemon: whoever leaves does not wait for a pipe that nobody empties.
        threading.Thread(target=self._write_all, name="output", daemon=True).start()

    async def write(self, text: str) -> None:
        """Return once all of it has been taken. Raises BrokenPipeError, OSError."""
        if text:
            self._last = self._loop.create_future()
            self._texts.put((text.encode(self._encoding, errors="replace"), self._last))
            await asyncio.shield(self._last)

    async def settle(self, seconds: float) -> None:
        """Wait for what is being written, so that no line is cut in two; not for a reader that has stopped."""
        if self._last is not None and not self._last.done():
            await asyncio.wait([self._last], timeout=seconds)

    def _write_all(self) -> None:
        while True:
            data, done = self._texts.get()
            failure: OSError | None = None
            try:
                while data:
                    try:
                        data = data[os.write(self._fd, data) :]
                    except BlockingIOError:  # Somebody else's setting on a terminal we share.
                        select.select([], [self._fd], [])
            except OSError as error:
                failure = error
            try:
                self._loop.call_soon_threadsafe(_finish, done, failure)
            except RuntimeError:
                return  # The loop has ended.


def _finish(done: "asyncio.Future[None]", failure: OSError | None) -> None:
    if done.done():
        return
    if failure is None:
        done.set_result(None)
    else:
        done.set_exception(failure)
