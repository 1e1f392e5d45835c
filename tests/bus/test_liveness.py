"""Peers that die, stop, hang, or come back, as the others see it: real processes and bare sockets."""

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import bus_peer
import msgspec
import pytest
from bus_peer import Counts, Done, GetCounts, GoOn, Hang, Note, Offer, Peer, Start, Wait, running
from raw_peer import RawDialler, RawListener

from callboard.bus import ActorDied, Address, LinkConfig, LinkLost, Node, VirtualClock, current_call
from callboard.bus.frames import Answer, Post
from callboard.bus.testing import run_virtual
from callboard.bus.transports.inproc import InprocHub


async def read_on(items: Any) -> None:
    async for _ in items:
        pass


class Keeper(Peer):
    """Serves as the process does, and notes why its handlers end."""

    def __init__(self) -> None:
        super().__init__()
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def on_offer(self, message: Offer) -> AsyncIterator[bus_peer.Event]:
        call = current_call()
        assert call is not None
        try:
            async for event in super().on_offer(message):
                yield event
        finally:
            self.ended.set_result(call.ended)


# ---- death -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_dialled", [True, False])
async def test_what_is_pending_with_a_killed_peer_ends_without_any_ping(tmp_path: Path, is_dialled: bool) -> None:
    # How soon is bench/deaths.py's question; here, that it takes no silence to tell.
    start = Start(f"ipc://{tmp_path}/peer.sock")
    links = LinkConfig(ping_s=60, silent_s=600)
    async with Node("test", endpoint=f"ipc://{tmp_path}/test.sock", links=links) as node:
        keeper = Keeper()
        own = node.add("keeper", keeper).address
        ref = node.ref(Address("peer", start.endpoint, "peer"))
        if not is_dialled:
            start.reads = own
        async with running(start) as process:
            if is_dialled:
                await ref.ask(GetCounts())
            else:  # It has dialled this node, which so has a link to it.
                assert node._links._by_key[start.endpoint].endpoint == ""
            async with ref.stream(Offer(), timeout=60) as items:
                await anext(items)
                asked = asyncio.ensure_future(ref.ask(Wait(), timeout=60))
                await asyncio.sleep(0.05)
                process.kill()
                async with asyncio.timeout(10):
                    with pytest.raises(ActorDied):
                        await asked
                    with pytest.raises(ActorDied):
                        await read_on(items)
                    if not is_dialled:
                        assert await keeper.ended == "actor_died"
                assert len(node._links._links) == 0


# ---- silence -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hangs", [False, True])
async def test_a_peer_that_is_stopped_or_hangs_is_cut_off_within_the_time_configured(
    tmp_path: Path, hangs: bool
) -> None:
    start = Start(f"ipc://{tmp_path}/peer.sock")
    async with Node("test", links=LinkConfig(ping_s=0.1, silent_s=0.6)) as node, running(start) as process:
        ref = node.ref(Address("peer", start.endpoint, "peer"))
        async with ref.stream(Offer(), timeout=60) as items:
            await anext(items)
            if not hangs:
                process.send_signal(signal.SIGSTOP)
            hanging = asyncio.ensure_future(ref.ask(Hang(60) if hangs else GetCounts(), timeout=60))
            async with asyncio.timeout(10):
                with pytest.raises(LinkLost, match="not been heard of"):
                    await read_on(items)
                with pytest.raises(LinkLost, match="not been heard of"):
                    await hanging


async def test_a_peer_that_was_cut_off_as_silent_is_waited_for_no_longer_when_it_is_dialled_again(
    tmp_path: Path,
) -> None:
    start = Start(f"ipc://{tmp_path}/peer.sock")
    links = LinkConfig(ping_s=0.1, silent_s=0.6, hello_s=60)
    async with Node("test", links=links) as node, running(start) as process:
        ref = node.ref(Address("peer", start.endpoint, "peer"))
        await ref.ask(GetCounts())
        process.send_signal(signal.SIGSTOP)
        for _ in range(3):  # The kernel goes on to accept connections for it.
            with pytest.raises(LinkLost, match="not been heard of"):
                await ref.ask(GetCounts(), timeout=20)
        process.send_signal(signal.SIGCONT)
        async with asyncio.timeout(20):
            while True:
                try:
                    await ref.ask(GetCounts(), timeout=20)
                    break
                except LinkLost:
                    await asyncio.sleep(0.05)


async def test_a_node_that_hung_itself_does_not_take_the_others_for_dead(tmp_path: Path) -> None:
    async with Node("test", endpoint=f"ipc://{tmp_path}/test.sock", links=LinkConfig(silent_s=60)) as node:
        own = node.add("keeper", Keeper()).address
        start = Start(f"ipc://{tmp_path}/peer.sock", LinkConfig(ping_s=0.1, silent_s=0.5), reads=own)
        async with running(start) as process:
            ref = node.ref(Address("peer", start.endpoint, "peer"))
            async with ref.stream(Offer(), timeout=60) as items:
                for _ in range(3):  # What it sees first when it goes on, its timers or its sockets, is chance.
                    await anext(items)
                    process.send_signal(signal.SIGSTOP)
                    await asyncio.sleep(0.8)
                    process.send_signal(signal.SIGCONT)
                    async with asyncio.timeout(10):
                        for _ in range(1000):
                            await anext(items)
                        await ref.ask(GoOn(1000), timeout=10)


# ---- fates nobody knows, and returns -----------------------------------------------------------------------------


async def test_a_link_that_breaks_without_proof_of_a_death_is_lost(tmp_path: Path) -> None:
    raw = RawListener(f"ipc://{tmp_path}/raw.sock")  # It says nothing of its process.
    async with Node("test") as node:
        ref = node.ref(Address("raw", raw.endpoint, "peer"))
        asked = asyncio.ensure_future(ref.ask(Wait(), timeout=60))
        await raw.welcome()
        await raw.next(Post)
        async with ref.stream(Offer(), timeout=60) as items:
            await raw.next(Post)
            raw.close()
            async with asyncio.timeout(5):
                for pending in (asked, read_on(items)):
                    with pytest.raises(LinkLost, match="disconnected"):
                        await pending


async def test_a_broken_link_is_not_dialled_again_before_somebody_asks(tmp_path: Path) -> None:
    raw = RawListener(f"ipc://{tmp_path}/raw.sock")
    async with Node("test") as node:
        ref = node.ref(Address("raw", raw.endpoint, "peer"))
        asked = asyncio.ensure_future(ref.ask(Wait(), timeout=60))
        await raw.welcome()
        await raw.next(Post)
        raw.close()
        with pytest.raises(LinkLost):
            await asked
        successor = RawListener(raw.endpoint, incarnation="other")
        with pytest.raises(TimeoutError):
            await successor.next(seconds=0.5)
        asked = asyncio.ensure_future(ref.ask(GetCounts(), timeout=60))
        await successor.welcome()
        post = await successor.next(Post)
        assert bytes(post.body) == msgspec.msgpack.encode(GetCounts())  # And not what was asked of its predecessor.
        await successor.send(Answer(post.id, msgspec.Raw(msgspec.msgpack.encode(Counts(1, 2, 3)))))
        assert await asked == Counts(1, 2, 3)
        successor.close()


async def test_a_peer_that_comes_back_is_another_one(tmp_path: Path) -> None:
    async with Node("test", endpoint=f"ipc://{tmp_path}/test.sock") as node:
        first = RawDialler(node.endpoint, incarnation="first")
        await first.hello(endpoint=f"ipc://{tmp_path}/raw.sock")
        ref = node.ref(Address("raw", f"ipc://{tmp_path}/raw.sock", "peer"))
        asked = asyncio.ensure_future(ref.ask(GetCounts(), timeout=60))
        post = await first.next(Post)
        second = RawDialler(node.endpoint, incarnation="second")
        await second.hello(endpoint=f"ipc://{tmp_path}/raw.sock")
        with pytest.raises(ActorDied, match="restarted"):
            await asked
        # What the first one still says, by its own link or by the other's, answers nothing.
        asked = asyncio.ensure_future(ref.ask(GetCounts(), timeout=60))
        assert (await second.next(Post)).id == post.id
        await first.send(Answer(post.id, msgspec.Raw(msgspec.msgpack.encode(Counts(6, 6, 6)))))
        await asyncio.sleep(0.1)
        assert not asked.done()
        second.incarnation = "first"
        await second.send(Answer(post.id, msgspec.Raw(msgspec.msgpack.encode(Counts(6, 6, 6)))))
        with pytest.raises(LinkLost, match="out of order"):
            await asked
        first.close()
        second.close()


# ---- ends of one's own -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_dialled", [True, False])
async def test_a_node_leaves_though_a_peer_does_not_read_what_it_was_sent(tmp_path: Path, is_dialled: bool) -> None:
    async with Node("test", endpoint=f"ipc://{tmp_path}/test.sock") as node:
        start = Start(f"ipc://{tmp_path}/peer.sock")
        if not is_dialled:
            start.reads = node.add("keeper", Keeper()).address
        async with running(start) as process:
            ref = node.ref(Address("peer", start.endpoint, "peer"))
            await ref.ask(GetCounts())
            process.send_signal(signal.SIGSTOP)
            for _ in range(2000):
                ref.tell(Note("x" * 10_000))
            async with asyncio.timeout(10):
                await asyncio.sleep(0.1)
                await node.stop()


class Stubborn:
    """Its handlers do not end when they are told to."""

    def __init__(self) -> None:
        self.may_end = False

    async def on_wait(self, message: Wait) -> Done:
        while not self.may_end:
            try:
                await asyncio.sleep(1.0)
            except asyncio.CancelledError:
                pass
        return Done()


def test_a_handler_that_ignores_its_cancellation_does_not_hold_up_the_stop(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        hub, stubborn = InprocHub(), Stubborn()
        async with Node(
            "caller", endpoint="inproc://caller", transport=hub.transport(), clock=VirtualClock()
        ) as caller:
            node = Node("node", endpoint="inproc://node", transport=hub.transport(), clock=VirtualClock())
            await node.__aenter__()
            asked = asyncio.ensure_future(caller.ref(node.add("stubborn", stubborn).address).ask(Wait(), timeout=60))
            await asyncio.sleep(1.0)
            async with asyncio.timeout(15.0):
                await node.stop()
            with pytest.raises(ActorDied):
                await asked
            stubborn.may_end = True
            await asyncio.sleep(2.0)

    run_virtual(story)
    [line] = [record.getMessage() for record in caplog.records]
    assert line == "node: stubborn's Stubborn.on_wait ignores its cancellation: the node stops without it"
