"""What real actors say to each other: the frames of a small fleet's run, one list for each kind of frame and message.

The run is on the virtual clock and from a seed, so the names, epochs and incarnations in it are those of every other
fleet with that seed: what was recorded here means something there.
"""

import asyncio
from collections import defaultdict
from typing import Any

import msgspec
from fleet import Fleet, running_fleet

from callboard.actors.engine.simulated import SimulatedRunner, Simulation
from callboard.actors.protocol import (
    Abort,
    Generate,
    GetSubRequests,
    ListEntries,
    PrepRecv,
    Probe,
    Release,
    SamplingParams,
    Watch,
)
from callboard.actors.trace_protocol import TRACER, Follow, GetMoment, GetRecords
from callboard.bus import BusError, Node, Ref
from callboard.bus.clock import VirtualClock
from callboard.bus.frames import Answer, AnyFrame, Items, Post
from callboard.bus.testing import run_virtual
from callboard.bus.transports.contract import Connection, Listener
from callboard.bus.transports.inproc import InprocHub, InprocTransport
from callboard.kv.tokens import pack_tokens

LAYOUT = SimulatedRunner(Simulation()).layout
SEED = 5
NUM_BLOCKS = 96
MOST_OF_A_KIND = 24

_split = msgspec.msgpack.Decoder(tuple[str, int, list[msgspec.Raw]]).decode
_frame = msgspec.msgpack.Decoder(AnyFrame).decode
_plain = msgspec.msgpack.Decoder().decode

Corpus = dict[str, list[tuple[str, bytes]]]
"""By kind (``Post/PrepRecv``, ``Items/Token``, ``Credit``): frames, each with the endpoint it went to."""


class RecordingHub(InprocHub):
    """A hub that keeps some frames of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.corpus: Corpus = defaultdict(list)

    def transport(self) -> InprocTransport:
        return _Recorded(self)

    def record(self, endpoint: str, batch: bytes) -> None:
        for raw in _split(batch)[2]:
            data = bytes(raw)
            kept = self.corpus[kind_of(data)]
            if len(kept) < MOST_OF_A_KIND:
                kept.append((endpoint, data))


class _Recorded(InprocTransport):
    async def start(self, endpoint: str, listener: Listener) -> str:
        assert isinstance(self.hub, RecordingHub)
        return await super().start(endpoint, _Tee(listener, endpoint, self.hub))


class _Tee:
    """Passes everything on to the node, and every batch to the hub too."""

    def __init__(self, listener: Listener, endpoint: str, hub: RecordingHub) -> None:
        self._listener = listener
        self._endpoint = endpoint
        self._hub = hub
        self.accepted = listener.accepted
        self.closed = listener.closed

    def received(self, connection: Connection, batch: bytes) -> None:
        self._hub.record(self._endpoint, batch)
        self._listener.received(connection, batch)


def kind_of(frame: bytes) -> str:
    """Return the kind of an encoded frame, with its message's if it carries one."""
    decoded: Any = _frame(frame)
    name = type(decoded).__name__
    if isinstance(decoded, Items):
        return f"{name}/{_plain(decoded.body)[0][0]}"
    return f"{name}/{_plain(decoded.body)[0]}" if isinstance(decoded, (Post, Answer)) else name


def record(seed: int = SEED) -> Corpus:
    """Run a fleet that does a bit of everything, and return what was said."""
    return run_virtual(lambda: _run(seed))


async def _run(seed: int) -> Corpus:
    hub = RecordingHub()
    simulated = Simulation(seconds_per_step=0.001)
    async with running_fleet(
        layout=LAYOUT, hub=hub, clock=VirtualClock(), seed=seed, num_blocks=NUM_BLOCKS, simulated=simulated
    ) as fleet:
        sampling = SamplingParams(max_tokens=9, ignore_eos=True)
        await asyncio.gather(*(fleet.generate([7 + i, *range(40 + 5 * i)], sampling) for i in range(6)))
        long = asyncio.ensure_future(fleet.generate([3, *range(60)], SamplingParams(max_tokens=400, ignore_eos=True)))
        while not long.done():
            await fleet.stats("kv-d")  # The engine may have unused blocks now: they are recalled.
            await asyncio.sleep(0.01)
        await _ask_around(fleet)
        await _misbehave(fleet, hub)
        await asyncio.sleep(3)
    return {kind: samples for kind, samples in hub.corpus.items() if samples}


async def _ask_around(fleet: Fleet) -> None:
    prompt = pack_tokens(range(50))
    await fleet.router.ask(GetSubRequests())
    await fleet.router.ask(GetSubRequests("request-1"))
    directory = Ref(fleet.client, fleet.actors["directory"].ref.address)
    await directory.ask(ListEntries())
    async with directory.stream(Watch(), timeout=5) as views:
        await anext(aiter(views))
    manager = fleet.managers["kv-d"]
    await manager.ask(Probe(prompt))
    reserved = await manager.ask(PrepRecv("by hand", 0, prompt, engine="d"))
    await manager.ask(Release(reserved.kv))
    await Ref(fleet.client, fleet.actors["d"].ref.address).ask(Abort("nobody's"))
    tracer = Ref(fleet.client, fleet.nodes["d"].address_of(TRACER))
    await tracer.ask(GetMoment())
    async with tracer.stream(GetRecords("request-1")) as past:
        assert [records async for records in past]
    async with tracer.stream(Follow(bodies="hashed", salt=b"salt", everything=True)) as records:
        await anext(aiter(records))


async def _misbehave(fleet: Fleet, hub: RecordingHub) -> None:
    """Leave a stream early, ask for what cannot be, and come from another fleet."""
    message = Generate("left", "tiny", pack_tokens(range(30)), SamplingParams(max_tokens=300, ignore_eos=True))
    async with fleet.router.stream(message, timeout=5) as tokens:
        await anext(aiter(tokens))
    for prompt in (b"", pack_tokens([10**6])):
        try:
            async with fleet.router.stream(Generate("bad", "tiny", prompt, SamplingParams()), timeout=5) as tokens:
                await anext(aiter(tokens))
        except BusError:
            pass
    async with Node("stranger", transport=hub.transport(), fleet="other", clock=VirtualClock()) as stranger:
        try:
            await stranger.ref(fleet.router.address).ask(GetSubRequests(), timeout=1)
        except BusError:
            pass
