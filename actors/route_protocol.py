"""The messages by which a router's script is changed while it serves. Fields are positional on the wire: append only.

A change is the whole of what a router is to run, and not a difference: whoever has it can take it over. It is prepared
on all routers, then activated on all (router/swap/swap.py), and a router that has missed it takes it from another one.
Scripts travel as their text, and never as a path on the router's machine.
"""

from typing import Annotated, Any, Literal

import msgspec

from callboard.bus import Ask, Message

from .page_protocol import Done as Done

MOST_SOURCE = 256 * 1024
"""Bytes of a script's text."""
MOST_TEXT = 16 * 1024
"""Characters of a traceback, and of a script's options as JSON."""

Line = Annotated[str, msgspec.Meta(max_length=1024)]
Text = Annotated[str, msgspec.Meta(max_length=MOST_TEXT)]
Source = Annotated[str, msgspec.Meta(max_length=MOST_SOURCE)]
What = Literal["started", "set", "canary", "shadow", "promoted", "rolled back", "failed"]
"""How a change came about; "failed": the router itself went back, because a script failed too often."""


class ScriptText(msgspec.Struct, frozen=True, array_like=True):
    """A script as it travels. ``path`` is where its setter has it: a name for people, which nobody opens."""

    name: Line
    path: Line
    source: Source
    options: dict[str, Any] = {}
    number: int = 0
    """The version's number: the epoch of the change that brought it. Two of one text are two versions."""


class RouteChange(msgspec.Struct, frozen=True, array_like=True):
    """What a router runs, since when, and by whom. Of two, the one with the larger (epoch, id) is the newer one."""

    epoch: int
    id: Line
    what: What
    active: ScriptText
    trial: ScriptText | None = None
    """A script that is tried beside it: with a ``share`` for some requests, else in the shadow of all."""
    share: Annotated[float, msgspec.Meta(ge=0.0, le=100.0)] = 0.0
    """Per cent of the requests that take the trial."""
    before: ScriptText | None = None
    """What a roll-back returns to."""
    max_failures: Annotated[int, msgspec.Meta(ge=0, le=20)] = 3
    """So many failures among the last 20 requests of what is new end it; 0: never."""
    routers: tuple[Line, ...] = ()
    """Whom it is meant for; empty: all that frontends ask."""
    by: Line = ""
    at: float = 0.0
    """Wall-clock seconds."""
    why: Text = ""
    """The traceback that ended a script."""
    is_new: bool = False
    """The active script was set, not returned to: if it fails too often, the router goes back to ``before``."""

    @property
    def age(self) -> tuple[int, str]:
        """Larger the newer it is."""
        return self.epoch, self.id


class RouteRecord(msgspec.Struct, frozen=True, array_like=True):
    """A change as the history keeps it: versions by their numbers."""

    epoch: int
    id: str
    what: What
    active: int
    trial: int | None
    share: float
    before: int | None
    by: str
    at: float
    why: str = ""


class Differing(msgspec.Struct, frozen=True, array_like=True):
    """A request for which the shadow decided otherwise: one line for each verb, in order."""

    request_id: str
    active: tuple[str, ...]
    shadow: tuple[str, ...]


class ShadowReport(msgspec.Struct, frozen=True, array_like=True):
    """How a shadow compares with the active script."""

    num_compared: int = 0
    num_agreed: int = 0
    num_skipped: int = 0
    """Requests without a shadow, because too many shadows were under way, or they took too much time."""
    num_unlike: int = 0
    """Requests that could not be compared: they ended before their script had."""
    num_failed: int = 0
    """Shadows that raised, or did not end."""
    last_error: str = ""
    differing: tuple[Differing, ...] = ()
    """The last ones."""
    num_moved: int = 0
    """Requests that were handed over between engines meanwhile, and so are not compared: a shadow is not moved."""


class BackgroundReport(msgspec.Struct, frozen=True, array_like=True):
    """One ``@background`` function of a version that is active."""

    name: str
    every_s: float | None
    num_runs: int
    num_failures: int
    last_error: str = ""


class VersionReport(msgspec.Struct, frozen=True, array_like=True):
    """What one router has seen of one version. Its script's text is there only if it was asked for."""

    script: ScriptText
    version: str
    """The first digits of the text's SHA-256."""
    num_requests: int
    num_failures: int
    """Requests that failed by the script's fault alone."""
    num_in_flight: int
    is_rolled_back: bool
    """It failed too often."""
    last_error: str = ""
    """The script's traceback of the last failure."""
    background: tuple[BackgroundReport, ...] = ()


class Routes(Message, frozen=True):
    """A router's versions. The change's texts, and those of the versions, are empty unless they were asked for."""

    router: str
    change: RouteChange
    history: tuple[RouteRecord, ...]
    """Oldest first, the present one last."""
    versions: tuple[VersionReport, ...]
    shadow: ShadowReport | None = None
    prepared: str = ""
    """Who has a change prepared at this moment, and of what."""
    problem: str = ""
    """Why it could not take over a newer change of another router's."""


class GetRoutes(Ask[Routes], frozen=True):
    """To a router: what it runs, and what it has run."""

    with_sources: bool = False


class Current(Message, frozen=True):
    """What a router runs now, with the texts."""

    change: RouteChange


class GetChange(Ask[Current], frozen=True):
    """To a router, from another one: what do you run?"""


class Prepared(Message, frozen=True):
    """The change is loaded here, and will be taken when it is activated within ``lease_s`` seconds."""

    lease_s: float


class PrepareRoute(Ask[Prepared], frozen=True):
    """To a router: load a change, and let no other one in meanwhile. A repeat does nothing.

    Raises RouteRefused if the router runs something else than ``base`` (a change's id), or has another change
    prepared; ScriptError if a script cannot be loaded here.
    """

    change: RouteChange
    base: Line


class ActivateRoute(Ask[Done], frozen=True):
    """To a router: run what was prepared under this id. A repeat does nothing. Raises RouteRefused."""

    id: Line


class DropRoute(Ask[Done], frozen=True):
    """To a router: forget what was prepared under this id. A repeat does nothing."""

    id: Line
