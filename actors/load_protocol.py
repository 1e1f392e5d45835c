"""An engine's load as a standing stream, for routers. Fields are positional on the wire: append only."""

from callboard.bus import Message, Stream

from .values import Load


class LoadReport(Message, frozen=True):
    """The load now, and which requests have come and gone since the report before.

    By the ids a router tells its own requests, which it counts to this instant, from those that others sent.
    """

    load: Load
    began: tuple[str, ...] = ()
    """Requests of which something has come to the engine: an id for each stream that it serves."""
    ended: tuple[str, ...] = ()
    """The same of streams that are over."""
    is_whole: bool = False
    """``began`` names all that the engine has, whatever was reported before."""


class WatchLoad(Stream[LoadReport], frozen=True):
    """To an engine: the load now, at once when a request comes, gets its first token, or ends, and soon as it changes.

    No report means no change: that the engine lives is told by the stream, which ends with it.
    """
