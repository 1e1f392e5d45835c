"""Scripts that keep a router's loop: the watchdog interrupts them, and what it has interrupted counts against them.

Where a request's code is interrupted, the request fails by its script's fault (running.py). What is interrupted
elsewhere, such as background work, or caught by the script, is told here. A script that cannot be interrupted ends the
router's process: the next one finds out which it was (swap/ended.py), before it serves.
"""

import logging
from typing import IO

from callboard.actors.actor import Actor
from callboard.bus.watchdog import Hung, Watchdog, open_dump

from .guest import Guest, guest_of
from .swap.ended import write_ended
from .swap.routes import Routes

log = logging.getLogger("callboard.router")


class HangingScripts:
    """Watches over a router's scripts, from ``start`` to ``stop``: none may keep the loop for ``hung_s`` seconds."""

    def __init__(self, router: Actor, routes: Routes, hung_s: float) -> None:
        self._router = router
        self._routes = routes
        self._hung_s = hung_s
        self._file: IO[bytes] | None = None
        self._watchdog: Watchdog | None = None

    def start(self) -> None:
        """Begin, if there is a time, and a clock that is real."""
        if not self._hung_s or self._router.node.clock.is_virtual:
            return
        path = self._routes.ended_at
        try:
            self._file = open_dump(path) if path else None
        except OSError as error:
            log.error("what ends this process cannot be kept in %s (%s): scripts that hang are not ended", path, error)
        self._watchdog = self._router.node.watchdog(
            self._hung_s,
            guest_of,
            on_hung=self._routes.hung,
            on_end=None if self._file is None else self._end,
            dump=self._file,
        )
        if self._watchdog is None:
            log.warning("scripts that hang are not interrupted: somebody else here has the signals for it")
            if self._file is not None:
                self._file.close()

    def stop(self) -> None:
        """End. A repeat does nothing."""
        if self._watchdog is not None:
            self._watchdog.stop()

    def _end(self, hung: Hung) -> None:
        guest: Guest = hung.guest
        words = f"script {guest.name} (version {guest.number}) keeps everything else here from going on"
        words += f" at {hung.file}:{hung.line}, and cannot be interrupted: this process ends"
        if self._file is not None:
            write_ended(self._file, guest.number, hung.line)
        log.critical("%s", words)
        if self._router.last_words is not None:
            self._router.last_words(words)
