"""The KV manager: the front door of a pool, and the shell around its books (kv/block_manager.py).

One per device, in a process of its own, so that it answers while engines compute, and its pool outlives them. Here
messages become decisions of the books, and waiting; sending pages is sender.py.
"""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, aclosing, contextmanager

import msgspec

from callboard.actors.move_protocol import SendHeld
from callboard.actors.protocol import (
    Admit,
    Admitted,
    Attach,
    Attached,
    BadRequest,
    CloseWrite,
    Done,
    Finish,
    GetKvStats,
    Give,
    KvAddr,
    KvStats,
    OpenWrite,
    PrepRecv,
    Probe,
    Probed,
    Recall,
    Refill,
    Release,
    RemoteSend,
    Reserved,
    Seal,
    Sent,
    Slab,
    TakePages,
    Tie,
    Tied,
    WriteOpened,
)
from callboard.bus import Call, current_call
from callboard.kv.accounts import Grant
from callboard.kv.block_manager import BlockManager
from callboard.kv.device_pages import warm_up
from callboard.kv.device_store import DeviceStore
from callboard.kv.lanes import WIRES, UcxWires, host_of
from callboard.kv.layout import BadRange, CorruptPages, OutOfBlocks, StaleReservation
from callboard.kv.poison import Poison
from callboard.kv.published import PublishedPool, published_in_process, published_to_processes
from callboard.kv.reservation_table import Held
from callboard.kv.slots import resolve_range, slot_runs
from callboard.kv.tokens import TOKEN_BYTES, num_tokens, pack_tokens, unpack_tokens

from .attachments import Attachments
from .held import as_remote_send, lend_held
from .pool_actor import PoolActor
from .quarantine import watch_quarantine
from .queue import BlockQueue, Priority
from .receiver import Receiver
from .report import report
from .sender import Sender
from .tiering import Tiering
from .warming import Warming
from .writers import SELF, Writers

STATS_RECALL_S = 0.5
"""How long engines may take to return unused blocks before they are counted."""


class KvManager(PoolActor):
    """Serves one pool: prep_recv, remote_send, probe and release for routers, blocks for engines, writes for peers."""

    def __init__(self, config: PoolActor.Config) -> None:
        super().__init__(config)
        self.engines = Attachments(self)
        self._sender = Sender(self, self.engines, lambda loan: self.warming.fill_loan(loan))
        self._receiver = Receiver(self)
        self._writers = Writers(self, self._receiver)
        self._leased = asyncio.Event()

    async def start(self) -> None:
        config, node = self.config, self.node
        self.epoch = node.new_id()
        self.blocks = BlockManager(
            config.num_blocks, config.layout.block_size, lease_s=config.lease_s, new_id=node.new_id, node=node.name
        )
        self.blocks.reservations.tie(SELF)
        self.queue = BlockQueue(node, self.blocks.allocator, self.engines.recall)
        self.tiers = Tiering(self)
        self.warming = Warming(self, self.tiers)
        ready: asyncio.Future[PublishedPool] = asyncio.get_running_loop().create_future()
        self.spawn(self._hold_pool(ready))
        self.wires = (node.exchange or {}).get(WIRES, UcxWires)(host_of(node.endpoint))
        self.spawn(self._receiver.hold_wires())
        pool = await ready
        self.store, self.pool_path = pool.store, pool.path
        if isinstance(self.store, DeviceStore):
            await node.run_blocking(warm_up, self.store)
        if node.clock.is_virtual:
            self.blocks.allocator.pool.watch = Poison(self.store)
        await self.tiers.start()
        self.spawn(self._expire())
        self.spawn(watch_quarantine(self, self._writers))
        if self.directory is not None:
            self.spawn(report(self, self.tiers, self._sender.lanes))

    async def stop(self) -> None:
        self._sender.is_stopping = True
        await self.tiers.stop()

    # ---- the verbs -----------------------------------------------------------------------------------------------

    async def on_prep_recv(self, message: PrepRecv) -> Reserved:
        _require_tokens(message.prompt)
        length = num_tokens(message.prompt)
        _, end = resolve_range(0, message.end, length)
        reservations, clock = self.blocks.reservations, self.node.clock
        key = (message.request_id, message.attempt, message.engine)
        # Whoever asks again does not queue: those who wait for blocks may be waiting for this one's.
        held = reservations.renew(key, message.prompt, end, now=clock.now())
        if held is None:
            await self.warming.warm(message.prompt)
            held = await self.queue.take(
                Priority.PREP_RECV,
                self.blocks.allocator.blocks_for(length),
                lambda: reservations.reserve(key, message.prompt, end, now=clock.now()),
                lambda held: reservations.disclaim(held.reservation.id),
                message.wait_s,
            )
        self._leased.set()
        return Reserved(self._address(held), held.num_cached_tokens, end, held.num_cached_tokens)

    async def on_remote_send(self, message: RemoteSend) -> Sent:
        _require_tokens(message.prompt)
        _, end = resolve_range(message.begin, message.end, num_tokens(message.prompt))
        await self.warming.warm(message.prompt, end)
        return await self._sender.send(message)

    async def on_send_held(self, message: SendHeld) -> Sent:
        return await self._sender.send(as_remote_send(message), lambda: lend_held(self.blocks, message))

    def on_probe(self, message: Probe) -> Probed:
        cached = self.blocks.cache.match(message.prompt).num_tokens
        blocks, config = self.blocks, self.config
        idle = blocks.cache.num_idle
        below = self.tiers.num_held_tokens(message.prompt)
        node, free = self.node, blocks.allocator.num_available
        return Probed(cached, free, config.num_blocks, node.incarnation, idle, below, node.name)

    def on_release(self, message: Release) -> Done:
        if message.kv.epoch == self.epoch:
            self.blocks.reservations.release(message.kv.reservation_id)
            self.changed()
        return Done()

    # ---- engines -------------------------------------------------------------------------------------------------

    async def on_attach(self, message: Attach) -> AsyncIterator[Attached | Recall]:
        async with aclosing(self.engines.serve(message, _caller())) as items:
            async for item in items:
                yield item

    async def on_admit(self, message: Admit) -> Admitted:
        """After an Admit that was cancelled or timed out, tell Finish: the answer may have been under way."""
        _require_tokens(message.tokens)
        if repeated := self.blocks.granted(message.engine, message.sequence_id, message.attachment):
            return _admitted(repeated)
        blocks, kv = self.blocks, message.kv
        total = blocks.allocator.blocks_for(num_tokens(message.tokens))
        engine, sequence_id, tokens = message.engine, message.sequence_id, message.tokens
        attachment = message.attachment

        def undo(_: Grant) -> None:
            blocks.disclaim(engine, sequence_id)

        if kv is None:
            await self.warming.warm(tokens)
            grant = await self.queue.take(
                Priority.ADMIT,
                total,
                lambda: blocks.admit(engine, sequence_id, tokens, attachment),
                undo,
                message.wait_s,
            )
            try:
                return _admitted(await self.warming.fill(engine, sequence_id, tokens, grant))
            except BaseException:
                undo(grant)
                raise
        with self._awaiting(kv) as held:
            await self._sealed(held)

            def adopt() -> Grant:
                return blocks.adopt(engine, sequence_id, tokens, kv.reservation_id, attachment)

            if total <= len(held.block_table):
                # Whoever lacks nothing does not queue: those who wait for blocks may be waiting for this one's.
                return _admitted(adopt())
            grant = await self.queue.take(Priority.ADMIT, total, adopt, undo, message.wait_s)
        return _admitted(grant)

    async def on_refill(self, message: Refill) -> Slab:
        got: list[int] = self.blocks.refill(message.engine, message.num_blocks, message.attachment)
        if not got and message.num_blocks > 0 and message.wait_s > 0:
            got = await self._await_refill(message)
        return Slab(pack_tokens(got))

    def on_give(self, message: Give) -> None:
        try:
            blocks = unpack_tokens(message.blocks)
        except ValueError as error:
            raise BadRequest(reason=f"Give of {message.engine}: {error}") from None
        self.blocks.give(message.engine, blocks, message.attachment)
        self.changed()

    def on_seal(self, message: Seal) -> None:
        try:
            self.blocks.seal(message.engine, message.sequence_id, message.tokens, unpack_tokens(message.block_table))
        except ValueError as error:
            raise BadRequest(reason=f"Seal of {message.sequence_id}: {error}") from None

    def on_finish(self, message: Finish) -> None:
        try:
            self.blocks.finish(message.engine, message.sequence_id, message.tokens, unpack_tokens(message.block_table))
        except ValueError as error:
            raise BadRequest(reason=f"Finish of {message.sequence_id}: {error}") from None
        finally:
            self.changed()

    # ---- peers ---------------------------------------------------------------------------------------------------

    async def on_tie(self, message: Tie) -> AsyncIterator[Tied]:
        self.require_epoch("", message.epoch)
        async with aclosing(self._writers.serve(message, _caller())) as items:
            async for item in items:
                yield item

    def on_open_write(self, message: OpenWrite) -> WriteOpened:
        return self.open_write(message, writer=_caller().caller_incarnation)

    async def on_take_pages(self, message: TakePages) -> Done:
        return await self._receiver.take(message, _caller())

    async def on_close_write(self, message: CloseWrite) -> Done:
        if message.is_complete and self.config.verify:
            self.require_epoch(message.reservation_id, message.epoch)
            begin_s = self.node.clock.now()
            try:
                await self.verify(message)
            except CorruptPages:
                self.close_write(msgspec.structs.replace(message, is_complete=False))
                raise
            finally:
                self.node.note(current_call(), "verify", begin_s)
        return self.close_write(message)

    async def on_get_kv_stats(self, message: GetKvStats) -> KvStats:
        clock = self.node.clock
        until = clock.now() + STATS_RECALL_S
        if message.recall and self.engines.recall(self.config.num_blocks):
            while any(self.blocks.slabs().values()) and clock.now() < until:
                await clock.sleep(0.01)
        problems = tuple(self.blocks.check_integrity())
        return KvStats(**dataclasses.asdict(self.blocks.counts()), problems=problems)

    # ---- waiting -------------------------------------------------------------------------------------------------

    async def _await_refill(self, message: Refill) -> list[int]:
        def attempt() -> list[int]:
            got = self.blocks.refill(message.engine, message.num_blocks, message.attachment)
            if not got:
                raise OutOfBlocks(needed=1, free=0)
            return got

        def undo(got: list[int]) -> None:
            self.blocks.give(message.engine, got, message.attachment)

        try:
            return await self.queue.take(Priority.REFILL, 1, attempt, undo, message.wait_s)
        except OutOfBlocks:
            return []

    @contextmanager
    def _awaiting(self, kv: KvAddr) -> Iterator[Held]:
        """Keep a reservation from expiring while it is waited for. Raises StaleReservation."""
        self.require_epoch(kv.reservation_id, kv.epoch)
        if kv.layout != self.config.layout:
            raise StaleReservation(reservation_id=kv.reservation_id, reason="its pool has another layout than this one")
        reservations = self.blocks.reservations
        held = reservations.get(kv.reservation_id)
        reservations.await_seal(kv.reservation_id)
        try:
            yield held
        finally:
            reservations.end_await(kv.reservation_id, now=self.node.clock.now())

    async def _sealed(self, held: Held) -> None:
        """Wait until a reservation is sealed, or will never be (adopting it then says why)."""
        reservation_id, clock = held.reservation.id, self.node.clock
        if self.blocks.reservations.is_settled(reservation_id):
            return
        begin_s = clock.now()
        try:
            while not self.blocks.reservations.is_settled(reservation_id):
                waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self.seal_waiters.setdefault(reservation_id, []).append(waiter)
                await waiter
        finally:
            self.node.note(current_call(), "pages", begin_s, reservation=reservation_id)

    def _address(self, held: Held) -> KvAddr:
        reservation, layout = held.reservation, self.config.layout
        return KvAddr(
            self.ref.address,
            self.epoch,
            reservation.id,
            layout,
            reservation.begin,
            reservation.end,
            slot_runs(held.block_table, reservation.begin, reservation.end, layout.block_size),
        )

    # ---- standing tasks ------------------------------------------------------------------------------------------

    async def _hold_pool(self, ready: asyncio.Future[PublishedPool]) -> None:
        """Own the pool's memory, and hand it out, for as long as the actor lives."""
        try:
            with self._published() as pool:
                ready.set_result(pool)
                await asyncio.get_running_loop().create_future()
        except Exception as error:
            ready.set_exception(error)

    def _published(self) -> AbstractContextManager[PublishedPool]:
        config, node = self.config, self.node
        if config.socket_dir is not None:
            return published_to_processes(
                config.socket_dir,
                self.name,
                config.layout,
                config.num_blocks,
                epoch=self.epoch,
                fd=config.pool_fd,
                device=config.device,
            )
        if node.exchange is None:
            raise ValueError(f"KV manager {config.name} needs a socket_dir: its peers are other processes")
        return published_in_process(
            node.exchange, f"{node.name}/{self.name}/{self.epoch}", config.layout, config.num_blocks
        )

    async def _expire(self) -> None:
        """End leases as their time comes."""
        clock, reservations = self.node.clock, self.blocks.reservations
        while True:
            expiry = reservations.next_expiry()
            if expiry is None:
                self._leased.clear()
                await self._leased.wait()
                continue
            # Leases made meanwhile end later than this one.
            await clock.sleep(max(0.0, expiry - clock.now()))
            reservations.expire(clock.now())
            self.changed()


def _caller() -> Call:
    call = current_call()
    assert call is not None
    return call


def _admitted(grant: Grant) -> Admitted:
    return Admitted(pack_tokens(grant.block_table), grant.num_cached_tokens)


def _require_tokens(data: bytes) -> None:
    """Raise BadRange for a prompt that is no whole number of token ids."""
    if len(data) % TOKEN_BYTES:
        raise BadRange(begin=0, end=None, num_tokens=num_tokens(data), reason="its bytes are no int32 token ids")
