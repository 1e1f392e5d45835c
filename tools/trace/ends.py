"""How watching ends: Ctrl-C, the key q, a signal, or a reader of our output that left."""

import asyncio
import os
import select
import signal
import sys
import termios
import tty
from contextlib import ExitStack
from typing import Self


class Ends:
    """Waits for the end of watching. Use as a context within a running loop; ``wait`` says why."""

    def __init__(self, *, with_keys: bool) -> None:
        self._with_keys = with_keys
        self._stack = ExitStack()
        self._why: asyncio.Future[str]

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._why = loop.create_future()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._end, "signal")
            self._stack.callback(loop.remove_signal_handler, number)
        if not sys.stdout.isatty():
            self._watch_reader(loop)
        if self._with_keys and sys.stdin.isatty():
            self._watch_keys(loop)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    async def wait(self) -> str:
        """Return why watching ends: ``signal``, ``key`` or ``pipe``."""
        return await asyncio.shield(self._why)

    def _end(self, why: str) -> None:
        if not self._why.done():
            self._why.set_result(why)

    def _watch_reader(self, loop: asyncio.AbstractEventLoop) -> None:
        # A pipe's end to write becomes "readable" when nobody is left to read: else `trace | head` would hang on.
        fd = sys.stdout.fileno()

        def gone() -> None:
            loop.remove_reader(fd)
            state = select.poll()
            state.register(fd, 0)
            if any(events & (select.POLLERR | select.POLLHUP) for _, events in state.poll(0)):
                self._end("pipe")

        try:
            loop.add_reader(fd, gone)
        except (OSError, ValueError):
            return  # A file: it never leaves.
        self._stack.callback(loop.remove_reader, fd)

    def _watch_keys(self, loop: asyncio.AbstractEventLoop) -> None:
        fd = sys.stdin.fileno()
        if os.tcgetpgrp(fd) != os.getpgrp():
            return  # In the background: the terminal is another's.
        before = termios.tcgetattr(fd)
        self._stack.callback(termios.tcsetattr, fd, termios.TCSADRAIN, before)
        tty.setcbreak(fd)

        def pressed() -> None:
            letter = os.read(fd, 1)
            if not letter:
                loop.remove_reader(fd)
            elif letter in b"qQ\x04":
                self._end("key")

        loop.add_reader(fd, pressed)
        self._stack.callback(loop.remove_reader, fd)
