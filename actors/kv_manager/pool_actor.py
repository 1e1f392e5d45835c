"""What the parts of a KV manager share: its pool, the books of it, and who waits for blocks."""

import asyncio
from functools import cached_property

import msgspec

from callboard.actors.actor import Actor
from callboard.actors.protocol import CloseWrite, Done, OpenWrite, WriteOpened
from callboard.kv.block_manager import BlockManager, Loan
from callboard.kv.digests import Digests
from callboard.kv.lanes import Lane, Pace, SimulatedPace, Wires, open_own_lane
from callboard.kv.layout import KvLayout, StaleReservation
from callboard.kv.page_store import PageStore
from callboard.kv.slots import slot_runs
from callboard.kv.tiers import TierSpec
from callboard.kv.tokens import TOKEN_BYTES, digest_of

from .queue import BlockQueue


class PoolActor(Actor):
    """An actor with a pool. The attributes without a value are set when it starts."""

    class Config(msgspec.Struct, frozen=True):
        """``pool_fd``: an inherited memfd. ``socket_dir``: where the pool is handed out, None within one process."""

        name: str
        layout: KvLayout
        num_blocks: int
        device: str = "cpu"
        lease_s: float = 10.0
        pool_fd: int | None = None
        socket_dir: str | None = None
        transport: str = "auto"
        """The kind of lane that pages go and come by; "auto" is the best one that both managers have."""
        wire_dtype: str = ""
        """What pages are packed as on their way here, where they are packed (kv/packing.py); the pool's if empty."""
        verify: bool = False
        """Whether pages that arrive are held against their senders' digests."""
        tiers: tuple[TierSpec, ...] = ()
        """Where evicted blocks go, at most one of each kind."""
        fingerprint: str = ""
        """Of the model whose KV it is (model_config.py): the tiers keep that of different ones apart."""

    store: PageStore
    epoch: str
    pool_path: str
    blocks: BlockManager
    wires: Wires
    """Where pages go that cannot be mapped."""
    queue: BlockQueue

    def __init__(self, config: Config) -> None:
        self.config = config
        self.num_bytes_sent = 0
        """Of KV, for remote_send."""
        self.seal_waiters: dict[str, list[asyncio.Future[None]]] = {}
        """Who waits for a reservation to be sealed, or to end, by its id."""

    def pace(self, to: str) -> Pace:
        """Return how pages are copied from here into a KV manager's pool."""
        return SimulatedPace(self.node.rng) if self.node.clock.is_virtual else Pace()

    @cached_property
    def own_lane(self) -> Lane:
        """The lane inside this manager's own pool, for what cannot change hands by the block."""
        return open_own_lane(self.store, self.pace(self.name))

    async def verify(self, message: CloseWrite) -> None:
        """Hold the pages of a write that is over against their digests. Raises CorruptPages."""
        try:
            held = self.blocks.reservations.get(message.reservation_id)
            write = held.reservation.writes[message.write_id]
        except (StaleReservation, KeyError):
            return  # It has been closed already.
        layout = self.config.layout
        runs = slot_runs(held.block_table, write.begin, write.end, layout.block_size)
        digests = Digests(layout, write.begin, write.end)
        await digests.add_pages(self.store, runs, write.begin, range(layout.num_layers))
        digests.require(message.digests, message.reservation_id)

    def end_loan(self, loan: Loan) -> None:
        """Give a loan back to the pool."""
        self.blocks.end_loan(loan)
        self.changed()

    def changed(self) -> None:
        """Go on with whoever waited for what may have happened just now."""
        self.queue.pump()
        for reservation_id in list(self.seal_waiters):
            if self.blocks.reservations.is_settled(reservation_id):
                for waiter in self.seal_waiters.pop(reservation_id):
                    if not waiter.done():
                        waiter.set_result(None)

    def open_write(self, message: OpenWrite, *, writer: str) -> WriteOpened:
        """Let a writer into a reservation. Raises StaleReservation, BadRange."""
        self.require_epoch(message.reservation_id, message.epoch)
        held = self.blocks.reservations.get(message.reservation_id)
        if message.prompt_digest and message.prompt_digest != digest_of(held.prompt[: message.end * TOKEN_BYTES]):
            raise StaleReservation(reservation_id=message.reservation_id, reason="it was made for another prompt")
        self.blocks.reservations.open_write(
            message.reservation_id,
            message.write_id,
            begin=message.begin,
            end=message.end,
            writer=writer,
            now=self.node.clock.now(),
        )
        slots = slot_runs(held.block_table, message.begin, message.end, self.config.layout.block_size)
        return WriteOpened(self.pool_path, self.config.num_blocks, slots, self.config.verify)

    def close_write(self, message: CloseWrite) -> Done:
        """Hear that a writer will never touch its slots again. A repeat does nothing. Raises StaleReservation."""
        self.require_epoch(message.reservation_id, message.epoch)
        try:
            self.blocks.reservations.close_write(
                message.reservation_id,
                message.write_id,
                is_complete=message.is_complete,
                now=self.node.clock.now(),
            )
        finally:
            self.changed()
        return Done()

    def require_epoch(self, reservation_id: str, epoch: str) -> None:
        """Raise StaleReservation unless ``epoch`` is this pool's."""
        if epoch != self.epoch:
            raise StaleReservation(reservation_id=reservation_id, reason="this KV manager has been restarted since")
