"""What all requests of one router share."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from callboard.actors.actor import Actor
from callboard.actors.protocol import Entry
from callboard.actors.registration import DirectoryView
from callboard.bus import Node

from .events import Events
from .known.lengths import Lengths
from .known.loads import Loads
from .known.prefixes import Prefixes
from .known.transfers import Transfers
from .spans import Spans

MOST_ROLES = 1000


@dataclass(frozen=True, slots=True)
class Shared:
    """The router's view of the fleet, its books, and the actor that carries its tasks."""

    router: Actor
    view: DirectoryView
    loads: Loads
    spans: Spans
    generations: dict[object, None] = field(default_factory=dict)
    """The streams of engines that are read (generation.py), in the order in which they began."""

    roles: set[tuple[str, str]] = field(default_factory=set)
    """The models and roles of all engines that were ever here: one that is dead comes back."""

    events: Events = field(default_factory=Events)
    prefixes: Prefixes = field(default_factory=Prefixes)
    transfers: Transfers = field(default_factory=Transfers)
    lengths: Lengths = field(default_factory=Lengths)

    def know(self, engines: Iterable[Entry]) -> None:
        """Remember what engines are for."""
        for entry in engines:
            if len(self.roles) < MOST_ROLES:
                self.roles.update((entry.model, role) for role in entry.roles or ("prefill", "decode"))

    @property
    def node(self) -> Node:
        """The router's node."""
        return self.router.node
