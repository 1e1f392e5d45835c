"""Whose code runs: what a script defines carries the script's version, from wherever it is called."""

from dataclasses import dataclass
from types import FrameType, ModuleType

_NAME = "__callboard_guest__"


@dataclass(frozen=True, slots=True)
class Guest:
    """A loaded version of a script. ``number`` is that of the router's version, 0 outside of routers."""

    name: str
    path: str
    number: int


def mark(module: ModuleType, guest: Guest) -> None:
    """Have all functions that a module defines be known as a guest's."""
    setattr(module, _NAME, guest)


def guest_of(frame: FrameType) -> Guest | None:
    """Return the script whose code a frame runs, None if it is no script's."""
    guest = frame.f_globals.get(_NAME)
    return guest if isinstance(guest, Guest) else None
