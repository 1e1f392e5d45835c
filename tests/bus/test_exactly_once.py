"""Every ask and stream ends exactly once, against a far side that answers, fails, repeats, and dies in any order.

The near side is the real one; the far side is a script of frames. Between two steps everybody may come to rest, or
not: then what the steps did races. Virtual time.
"""

import asyncio
from typing import Any

import msgspec
from calls_of_all_kinds import (
    CREDIT,
    ERROR_OF,
    LONG_S,
    NUM_EXAMPLES,
    Numbers,
    Work,
    assert_nothing_is_left,
    raw,
    rest,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_peer import Line, ScriptedPeer

from callboard.bus import Address, BusError, Node, VirtualClock
from callboard.bus.frames import Answer, Bye, Cancel, Credit, End, Fail, Items, Post
from callboard.bus.testing import run_virtual
from callboard.bus.transports.inproc import InprocHub


class Call:
    """One call of the node's, what it has observed, and by which ends it may have ended."""

    def __init__(self, number: int, *, is_stream: bool, deadline: float) -> None:
        self.number = number
        self.is_stream = is_stream
        self.deadline = deadline
        self.items: list[int] = []
        self.ends: list[str] = []
        self.possible: set[str] = set()
        """The ends that may come about, once the first of them is certain all."""
        self.is_certain = False
        self.num_sent = 0
        self.num_cancels = 0
        self.line: Line | None = None
        self.id = 0

    def may_end(self, how: str, *, is_certain: bool = True) -> None:
        self.possible.add(how)
        self.is_certain |= is_certain


class Asking:
    """The node, its calls, and the peer that they are asked of."""

    def __init__(self, node: Node, peer: ScriptedPeer) -> None:
        self.node = node
        self.peer = peer
        self.ref = node.ref(Address("peer", peer.endpoint, "worker"))
        self.calls: list[Call] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def call(self, call: Call) -> None:
        timeout = call.deadline - self.node.clock.now()
        try:
            if not call.is_stream:
                assert await self.ref.ask(Work(call.number), timeout=timeout) == call.number
                call.ends.append("answer")
                return
            async with self.ref.stream(Numbers(call.number), timeout=timeout, credit=CREDIT) as items:
                try:
                    async for item in items:
                        call.items.append(item)
                    call.ends.append("end")
                finally:
                    await self._nothing_follows(items)
        except BusError as error:
            call.ends.append(type(error).__name__)
        except asyncio.CancelledError:
            call.ends.append("cancelled")

    async def _nothing_follows(self, items: Any) -> None:
        """Read on after the end, or while being cancelled: there is an end, and it stays."""
        if not (task := asyncio.current_task()) or task.cancelling():
            return
        assert items.take_ready() == []
        for _ in range(2):
            try:
                assert await anext(items, None) is None
            except BusError:
                pass

    # ---- what happens, step by step ------------------------------------------------------------------------------

    async def step(self, kind: str, which: int, size: int) -> None:
        now = self.node.clock.now()
        if kind in ("ask", "stream"):
            if len(self.calls) < 6:
                call = Call(len(self.calls), is_stream=kind == "stream", deadline=now + (0.5, 2.0, LONG_S)[size])
                self.calls.append(call)
                self.tasks.append(task := asyncio.get_running_loop().create_task(self.call(call)))
                # One that is cancelled before its first step gets to observe nothing.
                task.add_done_callback(lambda task: call.ends.append("cancelled") if task.cancelled() else None)
        elif kind == "sleep":
            await self.settle()
            await asyncio.sleep((0.2, 0.7, 1.5)[size])
            self._note_deadlines()
        elif kind == "settle":
            await self.settle()
        elif kind in ("cut", "bye", "restart"):
            await self._end_links(kind)
        elif self.calls:
            self._about(self.calls[which % len(self.calls)], kind, size)

    def _about(self, call: Call, kind: str, size: int) -> None:
        """Do something about one call: cancel it, or have the peer send a frame for it."""
        is_open = not call.is_certain
        if kind == "cancel":
            self.tasks[call.number].cancel()
            if is_open:
                call.may_end("cancelled")
            return
        self._find(call)
        if call.line is None or not call.line.is_open:
            return
        if kind == "answer":
            call.line.send(Answer(call.id, raw(call.number)))
            how = "NotUnderstood" if call.is_stream else "answer"
        elif kind == "nonsense":
            call.line.send(Answer(call.id, raw("no number")) if size else Items(call.id, raw(["none"])))
            how = "NotUnderstood"
        elif kind == "end":
            call.line.send(End(call.id))
            how = "end" if call.is_stream else "LinkLost"
        elif kind == "fail":
            name = list(ERROR_OF)[which_error(call, size)]
            call.line.send(Fail(call.id, name, "so it is", "Tired"))
            how = ERROR_OF[name]
        else:
            num_granted = CREDIT + sum(f.count for f in call.line.heard if type(f) is Credit and f.id == call.id)
            call.line.send(Items(call.id, raw([call.num_sent + i for i in range(size + 1)])))
            call.num_sent += size + 1
            if call.is_stream and call.num_sent <= num_granted:
                return
            if is_open:  # Beyond the credit heard of so far: it may have been granted.
                call.may_end("NotUnderstood", is_certain=not call.is_stream)
            return
        if is_open:
            call.may_end(how)

    async def _end_links(self, kind: str) -> None:
        await self.settle()
        lines = [line for line in self.peer.lines if line.is_open]
        if kind == "restart":
            self.peer.incarnation += "'"
            self.peer.dial(self.node.endpoint)
        for line in lines if kind != "restart" else []:
            if kind == "cut":
                self.peer.cut(line)
            else:
                line.send(Bye())
        for call in self.calls:
            if not call.is_certain and call.line in lines:
                call.may_end("LinkLost" if kind == "cut" else "ActorDied")
        await self.settle()

    async def settle(self) -> None:
        """Let everything that was begun have its effect: a call that can have ended has."""
        await rest()
        for call in self.calls:
            self._find(call)
            if call.is_certain:
                assert call.ends, (call.number, call.possible)

    def _find(self, call: Call) -> None:
        """Look whether the peer has heard of a call: until then it says nothing about it."""
        for line in self.peer.lines if call.line is None else []:
            for frame in line.heard:
                if type(frame) is Post and msgspec.msgpack.decode(frame.body)[1] == call.number:
                    call.line, call.id = line, frame.id

    def _note_deadlines(self) -> None:
        for call in self.calls:
            if not call.is_certain and call.deadline + 0.02 < self.node.clock.now():
                call.may_end("AskTimeout")

    def check(self) -> None:
        for call in self.calls:
            assert len(call.ends) == 1, (call.number, call.ends)
            assert call.ends[0] in call.possible, (call.number, call.ends, call.possible)
            assert call.items == list(range(len(call.items)))
            heard = [] if call.line is None else [f for f in call.line.heard if getattr(f, "id", None) == call.id]
            kinds = [type(frame) for frame in heard]
            assert kinds.count(Post) <= 1
            assert kinds.count(Cancel) <= 1
            if Cancel in kinds:
                assert kinds[-1] is Cancel  # Nobody grants credit to what he has left.
            if call.ends[0] in ("answer", "end"):
                assert Cancel not in kinds
            if call.possible == {"cancelled"} and call.line is not None and call.line.is_open:
                assert Cancel in kinds


def which_error(call: Call, size: int) -> int:
    return (call.number + size) % len(ERROR_OF)


async def asking_story(steps: list[tuple[str, int, int]]) -> None:
    hub = InprocHub()
    peer = ScriptedPeer(hub, "inproc://peer")
    await peer.start()
    async with Node("node", endpoint="inproc://node", transport=hub.transport(), clock=VirtualClock()) as node:
        before = asyncio.all_tasks()
        asking = Asking(node, peer)
        for step in steps:
            await asking.step(*step)
        await asking.settle()
        await asyncio.sleep(2 * LONG_S)
        asking._note_deadlines()
        asking.check()
        assert all(task.done() for task in asking.tasks)
        assert_nothing_is_left(node, before)
    await peer.stop()


ASKING_STEPS = ["ask", "stream", "answer", "items", "items", "end", "fail", "nonsense", "cancel", "sleep", "settle"]


@settings(max_examples=NUM_EXAMPLES, derandomize=True, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*ASKING_STEPS, "settle", "cut", "bye", "restart"]), st.integers(0, 5), st.integers(0, 2)
        ),
        min_size=1,
        max_size=25,
    ).map(lambda steps: [("ask", 0, 2), ("stream", 0, 2), ("settle", 0, 0), *steps])
)
def test_whoever_asks_observes_one_end(steps: list[tuple[str, int, int]]) -> None:
    run_virtual(lambda: asking_story(steps))
