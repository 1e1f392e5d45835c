"""Log lines about peers, few of them: whoever sends nonsense without end must not fill the disk with our complaints."""

import logging

from .clock import Clock

EVERY_S = 10.0
"""At most one line about a peer in so long; the next one says how many were left out."""
MAX_PEERS = 64
"""Peers by name; those beyond share the lines of nobody in particular."""
MAX_TEXT = 300
"""Characters of a line that come from a peer, which may have sent megabytes."""


class Complaints:
    """Warns about peers by name."""

    def __init__(self, log: logging.Logger, node: str, clock: Clock) -> None:
        self._log = log
        self._node = node
        self._clock = clock
        self._last: dict[str, tuple[float, int]] = {}
        """When a line about a peer was written last, and how many were left out since."""

    def about(self, peer: str, what: str) -> None:
        """Warn that ``peer`` (empty if it has no name yet) did something, or count it."""
        now = self._clock.now()
        if peer not in self._last and len(self._last) >= MAX_PEERS:
            self._last = {name: entry for name, entry in self._last.items() if now - entry[0] < EVERY_S}
            if len(self._last) >= MAX_PEERS:
                peer = ""
        since, num_left_out = self._last.get(peer, (None, 0))
        if since is not None and now - since < EVERY_S:
            self._last[peer] = (since, num_left_out + 1)
            return
        self._last[peer] = (now, 0)
        more = f" (and {num_left_out} complaints more since the last line)" if num_left_out else ""
        self._log.warning("%s: peer %s %s%s", self._node, _clean(peer) or "(unknown)", _clean(what), more)


def _clean(text: str) -> str:
    """Return text of a peer's that fits on one line."""
    return "".join(c if c.isprintable() else "?" for c in text[:MAX_TEXT])
