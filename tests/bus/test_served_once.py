"""Every ask and stream that is served ends exactly once, against a caller that is a script of frames. Virtual time."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from calls_of_all_kinds import (
    CREDIT,
    LONG_S,
    NUM_EXAMPLES,
    Note,
    Numbers,
    Quick,
    Tired,
    Work,
    assert_nothing_is_left,
    raw,
    rest,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_peer import Line, ScriptedPeer

from callboard.bus import Node, VirtualClock, current_call
from callboard.bus.frames import ASK, STREAM, TELL, Answer, Bye, Cancel, Credit, End, Fail, Items, Post
from callboard.bus.testing import run_virtual
from callboard.bus.transports.inproc import InprocHub

KINDS: dict[str, type[Any]] = {"quick": Quick, "ask": Work, "stream": Numbers, "tell": Note}
REPEAT = 1000
"""What a call is answered with that took the id of another one."""


class Run:
    """One run of a handler: what it is told to do next, and how often and why it ended."""

    def __init__(self) -> None:
        self.orders: asyncio.Queue[str] = asyncio.Queue()
        self.ends: list[str] = []


class Worker:
    """Its handlers do what their Run is ordered to."""

    def __init__(self) -> None:
        self.runs: dict[int, Run] = {}

    def on_quick(self, message: Quick) -> int:
        return message.number

    async def on_work(self, message: Work) -> int:
        async for _ in self._obey(message.number):
            pass
        return message.number

    async def on_numbers(self, message: Numbers) -> AsyncIterator[int]:
        count = 0
        async for _ in self._obey(message.number):
            yield count
            count += 1

    async def on_note(self, message: Note) -> None:
        async for _ in self._obey(message.number):
            pass

    async def _obey(self, number: int) -> AsyncIterator[None]:
        run = self.runs[number] = Run()
        call = current_call()
        assert call is not None
        try:
            while (order := await run.orders.get()) != "finish":
                if order == "refuse":
                    raise Tired
                if order == "crash":
                    raise RuntimeError("a bug")
                yield
        finally:
            run.ends.append(call.ended)


def is_of_a_repeat(frame: Any) -> bool:
    """Return whether a frame answers a Post that came twice, and not the first of the two."""
    if type(frame) is Fail:
        return bool(frame.name == "NotUnderstood")
    return type(frame) is Answer and msgspec.msgpack.decode(frame.body) == REPEAT


class Asked:
    """Something the peer asked of the node."""

    def __init__(self, line: Line, call_id: int, kind: type[Any], timeout: float | None) -> None:
        self.line = line
        self.id = call_id
        self.kind = kind
        self.timeout = timeout
        self.num_repeats = 0
        self.num_granted = CREDIT
        self.is_cancelled = False

    def check(self) -> None:
        heard = [frame for frame in self.line.heard if getattr(frame, "id", None) == self.id]
        ends = [frame for frame in heard if type(frame) in (Answer, End, Fail)]
        items = [item for f in heard if type(f) is Items for item in msgspec.msgpack.decode(f.body)]
        assert items == list(range(len(items)))
        assert len(items) <= self.num_granted
        repeats = [end for end in ends if is_of_a_repeat(end)]
        own = [end for end in ends if not is_of_a_repeat(end)]
        assert len(repeats) == self.num_repeats or not self.line.is_open
        if self.kind is Note:
            assert not own
        elif self.is_cancelled or not self.line.is_open:
            assert len(own) <= 1
        else:
            assert len(own) == 1, own
        if own:
            assert type(own[0]) in ((End, Fail) if self.kind is Numbers else (Answer, Fail))
            after = heard[[frame is own[0] for frame in heard].index(True) + 1 :]
            assert all(is_of_a_repeat(frame) for frame in after)


class Serving:
    """The node and its actor, and the peer that asks."""

    def __init__(self, node: Node, peer: ScriptedPeer) -> None:
        self.node = node
        self.peer = peer
        self.worker = Worker()
        self.asked: list[Asked] = []
        self.line = peer.dial(node.endpoint)
        self._next_id = 0

    def _post(self, kind: type[Any], timeout: float | None) -> None:
        self._next_id += 1
        number = len(self.asked)
        self.asked.append(Asked(self.line, self._next_id, kind, timeout))
        way = STREAM if kind is Numbers else TELL if kind is Note else ASK
        self.line.send(Post(self._next_id, way, "worker", raw(kind(number)), timeout, "", CREDIT))

    async def step(self, kind: str, which: int, size: int) -> None:
        if kind in KINDS:
            if self.line.is_open:
                self._post(KINDS[kind], (None, 0.5, LONG_S)[size])
        elif kind == "sleep":
            await asyncio.sleep((0.2, 0.7, 1.5)[size])
        elif kind == "settle":
            await rest()
        elif kind in ("cut", "bye", "dial"):
            await rest()
            if kind == "cut":
                self.peer.cut(self.line)
            elif kind == "bye":
                self.line.send(Bye())
            await rest()
            if not self.line.is_open:
                self.line = self.peer.dial(self.node.endpoint)
                self._next_id = 0
                await rest()
        elif kind == "remove":
            self.node.remove("worker")
            self.node.add("worker", self.worker)
        elif self.asked:
            self._about(which % len(self.asked), kind, size)

    def _about(self, number: int, kind: str, size: int) -> None:
        asked, run = self.asked[number], self.worker.runs.get(number)
        if kind in ("finish", "refuse", "crash", "yield"):
            if run is not None:
                for _ in range(size + 1 if kind == "yield" else 1):
                    run.orders.put_nowait(kind)
            return
        if not asked.line.is_open:
            return
        if kind == "cancel":
            asked.is_cancelled = True
            asked.line.send(*[Cancel(asked.id)] * (1 + size % 2))
        elif kind == "grant":
            asked.num_granted += size
            asked.line.send(Credit(asked.id, size))
        elif kind == "repeat" and asked.line is self.line:
            # While the first lasts it is refused; afterwards it is a call of its own, as far as the node can tell.
            asked.num_repeats += 1
            self.line.send(Post(asked.id, ASK, "worker", raw(Quick(REPEAT)), None, "", CREDIT))

    async def finish(self) -> None:
        """Let all that still runs end well, and look what the peer has heard; then leave."""
        await asyncio.sleep(3.0)
        for number, asked in enumerate(self.asked):
            if asked.timeout == 0.5 and asked.kind in (Work, Numbers) and (run := self.worker.runs.get(number)):
                assert run.ends  # Whoever forgets to cancel it: its time is over.
            if asked.line.is_open:
                asked.num_granted += 1000
                asked.line.send(Credit(asked.id, 1000))
        for run in self.worker.runs.values():
            run.orders.put_nowait("finish")
        await rest(100)
        for asked in self.asked:
            asked.check()
        for run in self.worker.runs.values():
            assert len(run.ends) == 1
            assert run.ends[0] in ("", "cancelled", "timeout", "link_lost", "actor_died", "stopped")


async def serving_story(steps: list[tuple[str, int, int]]) -> None:
    hub = InprocHub()
    peer = ScriptedPeer(hub, "inproc://peer")
    await peer.start()

    def on_crash(name: str, error: BaseException) -> None:
        node.add(name, serving.worker)

    node = Node("node", endpoint="inproc://node", transport=hub.transport(), clock=VirtualClock(), on_crash=on_crash)
    async with node:
        before = asyncio.all_tasks()
        serving = Serving(node, peer)
        node.add("worker", serving.worker)
        await rest()
        for step in steps:
            await serving.step(*step)
        await serving.finish()
        await asyncio.sleep(2 * LONG_S)
        assert_nothing_is_left(node, before)
    await peer.stop()


SERVING_STEPS = [*KINDS, "stream", "ask", "finish", "refuse", "yield", "yield", "grant", "cancel", "repeat", "sleep"]


@settings(max_examples=NUM_EXAMPLES, derandomize=True, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*SERVING_STEPS, "settle", "settle", "settle", "crash", "remove", "cut", "bye"]),
            st.integers(0, 5),
            st.integers(0, 2),
        ),
        min_size=1,
        max_size=25,
    ).map(lambda steps: [("ask", 0, 2), ("stream", 0, 2), ("settle", 0, 0), *steps])
)
def test_whoever_is_served_hears_of_one_end(steps: list[tuple[str, int, int]]) -> None:
    run_virtual(lambda: serving_story(steps))
