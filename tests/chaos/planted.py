"""Bugs of the kinds that hurt users of serving systems, put into the production code for as long as they are entered.

Each is a small change of one decision, such as somebody might make, at the deepest defence against its consequence:
where two lines of defence overlap, it takes out both, and says so.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch
from weakref import WeakKeyDictionary

from callboard.actors.engine.engine import Engine
from callboard.actors.engine.generation import Generation
from callboard.actors.engine.moving import Movable
from callboard.actors.kv_manager import sender
from callboard.actors.kv_manager.manager import KvManager
from callboard.actors.kv_manager.pool_actor import PoolActor
from callboard.actors.protocol import Done, Release, Token, Usage
from callboard.kv.reservation import Reservation, State
from callboard.kv.reservation_table import Held, Key, ReservationTable
from callboard.kv.tiers import BlockName, Chain
from callboard.kv.tokens import TOKEN_BYTES
from callboard.router import recovery
from callboard.router.engine_stream import EngineStream
from callboard.router.generation import Generation as RouterGeneration
from callboard.router.recovery import Recovery
from callboard.router.request import Request

Planted = Callable[[], AbstractContextManager[object]]


@contextmanager
def a_block_returned_in_flight() -> Iterator[None]:
    """A reservation that is given up while it is written returns its blocks at once: there is no quarantine."""

    def leave(self: Reservation, state: State) -> None:
        if self.is_open:
            self._left_as = self.state = state

    with patch.object(Reservation, "_leave", leave):
        yield


@contextmanager
def kv_readable_before_it_arrived() -> Iterator[None]:
    """The prefix cache shows what a reservation is going to hold as soon as it is made."""
    reserve = ReservationTable.reserve

    def reserve_and_publish(self: ReservationTable, *args: Any, **options: Any) -> Held:
        held = reserve(self, *args, **options)
        if held.reservation.state is State.RESERVED:
            self._allocator.cache.insert(held.prompt[: held.reservation.end * TOKEN_BYTES], held.block_table)
        return held

    with patch.object(ReservationTable, "reserve", reserve_and_publish):
        yield


@contextmanager
def a_lost_abort() -> Iterator[None]:
    """An engine does not hear that the reader of a sequence has left: it goes on, or waits to be read, for ever."""

    def leave(self: Engine, generation: Generation) -> None:
        if generation.has_place:
            generation.has_place = False
            self._places.release()
        self._generations.pop(generation.sequence.sequence_id, None)

    with patch.object(Engine, "_leave", leave):
        yield


@contextmanager
def a_stale_epoch_accepted() -> Iterator[None]:
    """A KV manager takes what was meant for the one before its restart.

    Reservations have random ids besides, so that a stale one is unknown whatever its epoch says: here they are
    counted, and writers do not say whose KV they bring, so that only the epoch tells those of two starts apart.
    """
    reserve = ReservationTable.reserve
    counts: WeakKeyDictionary[ReservationTable, int] = WeakKeyDictionary()

    def reserve_named(self: ReservationTable, key: Key, *args: Any, **options: Any) -> Held:
        def name() -> str:
            counts[self] = counts.get(self, 0) + 1
            return str(counts[self])

        self._new_id = name
        return reserve(self, key, *args, **options)

    def accept(self: PoolActor, reservation_id: str, epoch: str) -> None:
        pass

    def on_release(self: KvManager, message: Release) -> Done:
        self.blocks.reservations.release(message.kv.reservation_id)
        self.changed()
        return Done()

    with ExitStack() as stack:
        stack.enter_context(patch.object(ReservationTable, "reserve", reserve_named))
        stack.enter_context(patch.object(PoolActor, "require_epoch", accept))
        stack.enter_context(patch.object(KvManager, "on_release", on_release))
        stack.enter_context(patch.object(sender, "digest_of", lambda data: b""))
        yield


@contextmanager
def a_retry_that_repeats_tokens() -> Iterator[None]:
    """The router starts a request over after an engine's death, although the client has some of its tokens."""

    def start_over(self: Recovery) -> Request:
        return Request(self._message, attempt=self._number, remaining_s=self._deadline.remaining_s)

    with patch.object(Recovery, "_request", start_over):
        yield


@contextmanager
def a_death_that_ends_requests() -> Iterator[None]:
    """The router gives a request up with the first engine that dies under it."""
    with patch.object(recovery, "NUM_ATTEMPTS", 1):
        yield


@contextmanager
def a_hand_over_that_drops_a_token() -> Iterator[None]:
    """The first token of the engine that a sequence was moved to is taken as the proof that it goes on, and no more."""

    async def switch(self: RouterGeneration, stream: EngineStream, first: Token, spent: Usage) -> None:
        before, self._stream = self._stream, stream
        self.give_back()
        await before.depart()

    with patch.object(RouterGeneration, "switch", switch):
        yield


@contextmanager
def a_hold_without_an_end() -> Iterator[None]:
    """A sequence that was held to be moved, and then was not, stands still: no message and no time lets it go."""

    def thaw(self: Movable, generation: Generation) -> None:
        pass

    with patch.object(Movable, "_thaw", thaw):
        yield


@contextmanager
def a_tier_that_forgets_the_prefix() -> Iterator[None]:
    """A tier knows a block by the tokens in it, and not by those before them."""
    child = Chain.child

    def child_of_nobody(self: Chain, parent: bytes, tokens: bytes) -> BlockName:
        return replace(child(self, self.root, tokens), parent=parent)

    with patch.object(Chain, "child", child_of_nobody):
        yield


PLANTED: dict[str, Planted] = {
    plant.__name__: plant
    for plant in (
        a_block_returned_in_flight,
        kv_readable_before_it_arrived,
        a_lost_abort,
        a_stale_epoch_accepted,
        a_retry_that_repeats_tokens,
        a_death_that_ends_requests,
        a_hand_over_that_drops_a_token,
        a_hold_without_an_end,
        a_tier_that_forgets_the_prefix,
    )
}
