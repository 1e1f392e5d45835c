"""Reservations that clients of the microserving door hold between two of its calls, and how they name them.

A client names a reservation by a string that it does not look into: manager, epoch and id, which are all that is
believed of it. Everything else about the reservation is kept here, because what a client sends must not say where KV
managers dial, or how pages are laid out; its lease, at its manager, ends it if nobody comes.
"""

import base64
import binascii
from collections import OrderedDict
from dataclasses import dataclass

import msgspec

from callboard.actors.protocol import KvAddr

MOST_HELD = 10_000
KEEP_S = 600.0
"""How long one is kept here of which nothing is heard: its lease has long ended it."""
LONGEST_NAME = 1024
"""Characters of a reservation's name."""
_VERSION = 1


class NotAName(ValueError):
    """A string that names no reservation."""


class _Name(msgspec.Struct, frozen=True, array_like=True):
    version: int
    manager: str
    epoch: str
    reservation_id: str


@dataclass(slots=True, eq=False)
class Held:
    """A reservation, of a client's request at one engine."""

    engine: str
    user: str
    prompt_digest: bytes
    end: int
    attempt: int
    kv: KvAddr
    last_s: float
    """When it was last heard of."""
    is_taken: bool = False
    """Whether start_generate has come for it."""

    @property
    def key(self) -> tuple[str, str]:
        return self.engine, self.user

    @property
    def name(self) -> str:
        """What its client calls it."""
        kv = self.kv
        name = _Name(_VERSION, kv.manager.actor, kv.epoch, kv.reservation_id)
        return base64.urlsafe_b64encode(msgspec.msgpack.encode(name)).decode()


class HeldReservations:
    """All of one door, by engine and user, and by name."""

    def __init__(self) -> None:
        self._by_key: dict[tuple[str, str], Held] = {}
        self._by_id: OrderedDict[tuple[str, str], Held] = OrderedDict()
        """By epoch and reservation id, the longest unheard of first."""

    def __len__(self) -> int:
        return len(self._by_id)

    def put(self, held: Held) -> list[Held]:
        """Take a reservation in; return those that must be released, because there is no room or a newer one."""
        before = self._by_key.get(held.key)
        self._by_key[held.key] = held
        self._by_id[held.kv.epoch, held.kv.reservation_id] = held
        self.touch(held, held.last_s)
        dropped = [] if before is None or before.name == held.name or before.is_taken else [before]
        while self._by_id:
            oldest = next(iter(self._by_id.values()))
            if len(self._by_id) <= MOST_HELD and oldest.last_s > held.last_s - KEEP_S:
                break
            dropped.append(oldest)
            self.forget(oldest)
        for each in dropped:
            self.forget(each)
        return dropped

    def of(self, engine: str, user: str) -> Held | None:
        """Return what a user's request holds at an engine."""
        return self._by_key.get((engine, user))

    def named(self, name: str) -> Held | None:
        """Return the reservation of that name, None if it is not (or no longer) here. Raises NotAName."""
        if len(name) > LONGEST_NAME:
            raise NotAName(f"it has more than {LONGEST_NAME} characters")
        try:
            # Not lenient: what is no base64 would else be left out.
            read = msgspec.msgpack.decode(base64.b64decode(name, altchars=b"-_", validate=True), type=_Name)
        except (binascii.Error, ValueError, msgspec.MsgspecError) as error:
            raise NotAName(str(error)) from None
        held = self._by_id.get((read.epoch, read.reservation_id))
        if read.version != _VERSION or held is None or held.kv.manager.actor != read.manager:
            return None
        return held

    def touch(self, held: Held, now: float) -> None:
        """Note that its client was heard of."""
        held.last_s = now
        self._by_id.move_to_end((held.kv.epoch, held.kv.reservation_id))

    def forget(self, held: Held) -> None:
        """Take one out. A repeat does nothing."""
        key = held.kv.epoch, held.kv.reservation_id
        if self._by_id.get(key) is held:  # Else a repeated prep_recv stands for it by now.
            del self._by_id[key]
        if self._by_key.get(held.key) is held:
            del self._by_key[held.key]
