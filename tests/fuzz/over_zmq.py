"""The fuzz over real ZeroMQ: bare sockets against a node in a process of its own.

What ZeroMQ itself makes of it is part of it: messages of many parts, of none, over the size limit, sockets that come
and go by the thousand, routing ids given twice, and streams of bytes that are no ZeroMQ at all.
"""

import asyncio
import os
import random
import socket as sockets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvloop
import zmq

from callboard.bus import Address, BusError, Node, Ref
from callboard.bus.frames import MAX_BATCH_BYTES, MAX_FRAME_BYTES, Bye, Refused, decode_batch

from .in_process import FuzzError, Say, Totals, Word
from .mutator import Mutator
from .peer import Peer
from .recorder import Corpus
from .served_node import Health, HowAreYou

BURST = 64
HEAR_S = 10.0
HONEST_EVERY = 16
"""Bursts."""
MOST_GARBAGE_SOCKETS = 32
LOG = "log"


class Dealer:
    """A bare DEALER, as a connection of the fuzzer's."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.connect(endpoint)

    def send(self, batch: bytes | bytearray) -> bool:
        self.socket.send(batch)
        return True

    def close(self) -> None:
        self.socket.close(0)


class DealerHub:
    """Gives the fuzzer a transport of bare sockets, all to one node."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str) -> None:
        self.context = context
        self.endpoint = endpoint
        self.listener: Any = None
        self.dealers: dict[Dealer, None] = {}

    def transport(self) -> "DealerHub":
        return self

    async def start(self, endpoint: str, listener: Any) -> str:
        self.listener = listener
        return endpoint

    def dial(self, endpoint: str) -> Dealer:
        dealer = Dealer(self.context, self.endpoint)
        self.dealers[dealer] = None
        return dealer

    def hear(self) -> None:
        """Take in what has come. After a Refused or a Bye nothing comes any more: a ROUTER cuts nobody off."""
        for dealer in list(self.dealers):
            if dealer.socket.closed:
                del self.dealers[dealer]
            while not dealer.socket.closed:
                try:
                    batch = dealer.socket.recv(zmq.NOBLOCK)
                except zmq.Again:
                    break
                self.listener.received(dealer, batch)
                if any(isinstance(frame, (Refused, Bye)) for frame in decode_batch(batch)[2]):
                    self.listener.closed(dealer, "refused")
                    dealer.close()

    async def stop(self) -> None:
        for dealer in self.dealers:
            dealer.close()
        self.dealers.clear()


class Rough:
    """What no Callboard node would even put into ZeroMQ."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", path: str, mutator: Mutator) -> None:
        self._context = context
        self._path = path
        self._mutator = mutator
        self._open: list[sockets.socket] = []

    def do_one(self) -> None:
        """Do one such thing."""
        rng = self._mutator.rng
        rng.choice((self._parts, self._empty, self._comes_and_goes, self._same_id, self._no_zmq, self._large))()

    def _parts(self) -> None:
        dealer = self._dealer()
        count = 2 ** int(self._mutator.rng.random() * 12)
        dealer.send_multipart([self._mutator.garbage()[:64] for _ in range(count)])
        dealer.close(100)

    def _empty(self) -> None:
        dealer = self._dealer()
        dealer.send(b"")
        dealer.send_multipart([b"", b""])
        dealer.close(100)

    def _comes_and_goes(self) -> None:
        for _ in range(8):
            dealer = self._dealer()
            dealer.send(self._mutator.garbage())
            dealer.close(0 if self._mutator.rng.random() < 0.5 else 50)

    def _same_id(self) -> None:
        first, second = self._dealer(b"same"), self._dealer(b"same")
        for dealer in (first, second):
            dealer.send(self._mutator.garbage())
            dealer.close(50)

    def _large(self) -> None:
        if self._mutator.rng.random() < 0.02:
            dealer = self._dealer()
            dealer.send(bytes(MAX_FRAME_BYTES + MAX_BATCH_BYTES + 1))
            dealer.close(500)

    def _no_zmq(self) -> None:
        """A stream socket that sends bytes: a greeting, or part of one, or none, and then anything."""
        raw = sockets.socket(sockets.AF_UNIX)
        raw.setblocking(False)
        try:
            raw.connect(self._path)
            greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)
            ready = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
            data = greeting + ready + self._mutator.garbage()
            raw.send(data if self._mutator.rng.random() < 0.3 else self._mutator.flip(data))
        except OSError:
            pass
        self._open.append(raw)
        if len(self._open) > MOST_GARBAGE_SOCKETS:
            self._open.pop(0).close()

    def _dealer(self, routing_id: bytes | None = None) -> "zmq.Socket[bytes]":
        dealer = self._context.socket(zmq.DEALER)
        if routing_id is not None:
            dealer.setsockopt(zmq.ROUTING_ID, routing_id)
        dealer.connect(f"ipc://{self._path}")
        return dealer

    def close(self) -> None:
        for raw in self._open:
            raw.close()


class Served:
    """The process under fuzz, and an honest node beside it."""

    def __init__(self, honest: Node, endpoint: str, log: Path) -> None:
        self.log = log
        self._refs = {name: Ref(honest, Address("served", endpoint, name)) for name in ("parrot", "doctor")}

    async def check(self) -> Health:
        """Return how it is. Raises FuzzError if it does not answer, or has logged an error."""
        try:
            if await self._refs["parrot"].ask(Say("alive"), timeout=HEAR_S) != Word("alive"):
                raise FuzzError("an honest question got a wrong answer")
            health = await self._refs["doctor"].ask(HowAreYou(), timeout=HEAR_S)
        except BusError as error:
            raise FuzzError(f"the node does not answer ({error}); it said: {self.log.read_text()[-3000:]}") from None
        if health.problems:
            raise FuzzError("\n".join(health.problems))
        return health


async def _fuzz(
    corpus: Corpus,
    seed: int,
    messages: int,
    progress: Callable[[int], None],
    directory: str,
    context: "zmq.Context[zmq.Socket[bytes]]",
) -> Totals:
    path = f"{directory}/served.sock"
    mutator = Mutator(random.Random(seed), corpus)
    hub = DealerHub(context, f"ipc://{path}")
    endpoints = sorted({where for kept in corpus.values() for where, _ in kept if mutator.takes(where)})
    peer = Peer(hub, mutator, endpoints, "test", hears_cuts=False)
    await peer.start()
    rough = Rough(context, path, mutator)
    async with Node("honest", fleet="test") as honest:
        served = Served(honest, f"ipc://{path}", Path(directory, LOG))
        try:
            return await _bother(served, hub, peer, rough, messages, progress)
        except FuzzError as error:
            lines = [(line.endpoint, list(line.log)) for line in peer.used]
            raise FuzzError(str(error), peer.counts["sent"], lines) from None
        finally:
            rough.close()
            await peer.stop()


@contextmanager
def _served_node(directory: str) -> Iterator[None]:
    """Run the node in a process of its own. Raises FuzzError if it does not start."""
    log = Path(directory, LOG)
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "fuzz.served_node", directory],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,  # Ctrl-C is ours; the process ends with its stdin.
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        )
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise FuzzError(f"the node did not start: {log.read_text()}")
        yield
    finally:
        process.kill()
        process.communicate()


async def _bother(
    served: Served, hub: DealerHub, peer: Peer, rough: Rough, messages: int, progress: Callable[[int], None]
) -> Totals:
    await asyncio.sleep(1)
    calm = await served.check()
    early: Health | None = None
    num_bursts = 0
    while peer.counts["sent"] < messages:
        peer.used.clear()
        for _ in range(min(BURST, messages - peer.counts["sent"])):
            peer.send_one()
        rough.do_one()
        await _hear_all(hub, peer)
        num_bursts += 1
        progress(peer.counts["sent"])
        if num_bursts % HONEST_EVERY == 0:
            await served.check()
        if early is None and peer.counts["sent"] >= messages / 5:
            early = await served.check()
    late = await served.check()
    peer.close()
    await _until_calm(served, calm)
    growth = late.rss_mib - (early or calm).rss_mib
    return Totals(peer.counts, late.num_refused, growth, late.num_lines)


async def _hear_all(hub: DealerHub, peer: Peer) -> None:
    """Wait until the node has said all that it must about this burst. Raises FuzzError."""
    deadline = asyncio.get_running_loop().time() + HEAR_S
    while True:
        hub.hear()
        if not peer.waits() or asyncio.get_running_loop().time() > deadline:
            break
        await asyncio.sleep(0.0005)
    peer.judge()
    if peer.problems:
        raise FuzzError("\n".join(peer.problems[:3]))


async def _until_calm(served: Served, calm: Health) -> None:
    """Wait until nothing of what was asked is under way any more, as far as deadlines can end it."""
    for _ in range(300):
        health = await served.check()
        if health.census[2:] <= calm.census[2:]:
            return
        await asyncio.sleep(0.1)
    raise FuzzError(f"strangers, asked, served, handlers: before {calm.census}, after {health.census}")


def run_over_zmq(corpus: Corpus, seed: int, messages: int, progress: Callable[[int], None]) -> Totals:
    """Send so many batches to a node in another process; return the totals. Raises FuzzError."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 8192)
    with (
        tempfile.TemporaryDirectory() as directory,
        _served_node(directory),
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        try:
            return runner.run(_fuzz(corpus, seed, messages, progress, directory, context))
        finally:
            context.destroy(0)
