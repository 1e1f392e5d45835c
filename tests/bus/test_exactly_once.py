"""Every ask and stream ends exactly once, against a far side that answers, fails, repeats, and dies in any order.

The near side is the real one; the far side is a script of frames. Between two steps everybody may come to rest, or
not: then what the steps did races. Virtual time.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_peer import Line, ScriptedPeer

from callboard.bus import Address, Ask, BusError, Node, Refusal, Stream, Tell, VirtualClock, current_call
from callboard.bus.frames import ASK, STREAM, TELL, Answer, Bye, Cancel, Credit, End, Fail, Items, Post
from callboard.bus.testing import run_virtual
from callboard.bus.transports.inproc import InprocHub

NUM_EXAMPLES = 250
CREDIT = 3
LONG_S = 100.0
ERROR_OF = {"refusal": "Tired", "actor_died": "ActorDied", "timeout": "AskTimeout", "link_lost": "LinkLost"}


class Work(Ask[int], frozen=True):
    number: int


class Quick(Ask[int], frozen=True):
    number: int


class Numbers(Stream[int], frozen=True):
    number: int


class Note(Tell, frozen=True):
    number: int


class Tired(Refusal):
    sentence = "too tired"


def raw(value: Any) -> msgspec.Raw:
    return msgspec.Raw(msgspec.msgpack.encode(value))


async def rest(num_passes: int = 12) -> None:
    """Let the loop run until whatever was sent has arrived and had its effect. No time passes."""
    for _ in range(num_passes):
        await asyncio.sleep(0)


# ---- the asking side ---------------------------------------------------------------------------------------------


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


def assert_nothing_is_left(node: Node, tasks_before: set[asyncio.Task[Any]]) -> None:
    for link in node._links._links:
        assert not link.asked
        assert not link.served
    assert not node._server._serving
    assert not node.deadlines._slots
    assert asyncio.all_tasks() == tasks_before


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


# ---- the serving side --------------------------------------------------------------------------------------------


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
