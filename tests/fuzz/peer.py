"""A peer of a node that keeps to no rule, and an exact book of what the node owes it.

It dials nodes, and is dialled by them where a message makes them. For every question that a node can read there must be
exactly one end; a batch that cannot be read must cut the link, and say so; and no more items may come than it has
given credit for.
"""

import random
from collections import Counter
from typing import Any

import msgspec

from callboard.actors import protocol
from callboard.bus import Ask, Stream
from callboard.bus.frames import (
    PROTOCOL_VERSION,
    Answer,
    AnyFrame,
    Bye,
    End,
    Fail,
    Frame,
    Hello,
    Items,
    Post,
    Refused,
    Welcome,
    decode_batch,
)
from callboard.bus.messages import answer_type
from callboard.bus.transports.contract import Connection

from .line import Line
from .mutator import FUZZ_ADDRESS, Mutator, decode, encode

MOST_LINKS = 16
_LAST_FRAMES = (Hello, Welcome, Refused, Bye)
_Failures = msgspec.MsgspecError, ValueError, RecursionError


class Peer:
    """Sends batches that are mostly wrong. ``problems`` holds what a node did that it must not."""

    def __init__(
        self, hub: Any, mutator: Mutator, endpoints: list[str], fleet: str, *, hears_cuts: bool = True
    ) -> None:
        self.problems: list[str] = []
        self.counts: Counter[str] = Counter()
        self.lines: list[Line] = []
        self.accepted_lines: dict[Connection, Line] = {}
        self._by_connection: dict[Connection, Line] = {}
        self._transport = hub.transport()
        self._mutator = mutator
        self._rng: random.Random = mutator.rng
        self.endpoints = endpoints
        self._fleet = fleet
        self._hears_cuts = hears_cuts
        """Its transport tells of a link that is cut without a word."""
        self._num_lines = 0
        self._left: list[Line] = []
        self.used: dict[Line, None] = {}
        """Lines that something was sent over in this burst."""
        self._replies = {
            name: _reply_kinds(kind, mutator) for name, kind in vars(protocol).items() if _is_question(kind)
        }

    async def start(self) -> None:
        await self._transport.start(FUZZ_ADDRESS[1], self)

    # ---- sending -------------------------------------------------------------------------------------------------

    def send_one(self) -> None:
        """Send one batch over some line, or over a new one."""
        rng = self._rng
        if len(self.lines) < MOST_LINKS or rng.random() < 0.002:
            self._dial()
        if self.accepted_lines and rng.random() < 0.1:
            line = self._mutator.pick(list(self.accepted_lines.values()))
        else:
            line = self._mutator.pick(self.lines)
        if line.has_greeted:
            self._send_open(line)
        else:
            self._greet(line)
        if not line.is_left and rng.random() < 0.0005:
            self._leave(line)
            self._close(line)

    def _dial(self) -> None:
        self._num_lines += 1
        endpoint = self._mutator.pick(self.endpoints)
        line = Line(endpoint, f"fuzz-{self._num_lines}", self._transport.dial(endpoint))
        self._by_connection[line.connection] = line
        self.lines.append(line)

    def _greet(self, line: Line) -> None:
        kind = Hello if line in self.lines else Welcome
        name = f"node-{self._rng.getrandbits(64):016x}"  # No mutation makes another's of it, and takes its place.
        hello: Frame = kind(PROTOCOL_VERSION, self._fleet, name, line.incarnation, "")
        if self._rng.random() < 0.9:
            line.has_greeted = True
            self._put(line, encode((line.incarnation, line.sent, [hello])))
            return
        tree = decode(encode(hello))
        self._mutator.mutate(tree)
        # Under another node's endpoint it would be taken for that node: whoever has the fleet's keys is trusted so far.
        if len(tree) > 5 and type(tree[5]) is str:
            tree[5] = ""
        data = encode((line.incarnation, line.sent, [tree]))
        if self._rng.random() < 0.3:
            data = self._mutator.flip(data)
        self._leave(line)  # Whether it is one that may pass or not.
        self._put(line, data)

    def _send_open(self, line: Line) -> None:
        chance = self._rng.random()
        if chance < 0.82:
            count = 1 if self._rng.random() < 0.9 else 1 + int(self._rng.random() * 6)
            data = encode((line.incarnation, line.sent, [self._frame(line) for _ in range(count)]))
        elif chance < 0.84:
            data = self._mutator.garbage()
        elif chance < 0.86:
            tree = [line.incarnation, line.sent, [self._frame(line)]]
            self._mutator.mutate(tree)
            data = encode(tree)
        elif chance < 0.87:
            other = line.sent + self._mutator.pick((1, -1, 2**40))
            data = encode((line.incarnation, other, [self._frame(line)]))
        elif chance < 0.88:
            data = encode(("another", line.sent, [self._frame(line)]))
        elif chance < 0.8801:
            data = encode((line.incarnation, line.sent, [[11]] * 2000))
        else:
            data = self._mutator.flip(encode((line.incarnation, line.sent, [self._frame(line)])))
        self._put(line, data)

    def _frame(self, line: Line) -> Any:
        """Return a frame for an open line."""
        chance = self._rng.random()
        if chance < 0.72 and line.endpoint:
            line.num_asked += 1
            call_id = line.num_asked if self._rng.random() < 0.97 else self._some_id(line)
            return self._mutator.post(line.endpoint, call_id)
        if chance < 0.8:
            kind = self._mutator.pick(self._mutator.kinds)
            if kind in ("Bye", "Hello", "Welcome", "Refused") and self._rng.random() < 0.9:
                kind = "Ping"
            tree = self._mutator.frame(kind)
            if len(tree) > 1 and type(tree[1]) is int:
                tree[1] = self._some_id(line)
            if self._rng.random() < 0.3:
                self._mutator.mutate(tree)
            return tree
        if chance < 0.9 and line.calls:
            return self._reply(line, self._mutator.pick(line.calls), self._mutator.pick(self._mutator.kinds))
        call_id = self._some_id(line)
        tree = self._mutator.pick(
            (
                [9, call_id],
                [9, call_id],
                [10, call_id, self._mutator.pick((1, 7, 256, 0, -1, 2**40, -(2**40)))],
                [7, call_id],
                [8, call_id, "refusal", "no", "BadRequest", {"reason": "no"}],
                [8, call_id, self._mutator.pick(("actor_died", "link_lost", "timeout", "?")), "no"],
                [5, call_id, ["Done"]],
                [6, call_id, [["Done"]]],
            )
        )
        if self._rng.random() < 0.1:
            self._mutator.mutate(tree, 1)
        return tree

    def _some_id(self, line: Line) -> int:
        chance = self._rng.random()
        if chance < 0.6:
            return max(0, line.num_asked - int(self._rng.random() * 20))
        if chance < 0.8:
            return int(self._rng.random() * 100)
        return int(self._mutator.pick((0, -1, 2**62, -(2**62), 2**32)))

    def _reply(self, line: Line, call_id: int, kind: str) -> Any:
        """Return an answer, item or end of a recorded kind for a question that a node asked."""
        if not kind.startswith(("Answer/", "Items/", "Fail", "End", "Cancel", "Credit")):
            kind = "End"
        tree = self._mutator.frame(kind)
        tree[1] = call_id
        if self._rng.random() < 0.3:
            self._mutator.mutate(tree, 2)
        return tree

    def _put(self, line: Line, data: bytes) -> None:
        """Send a batch, and note what is due for it."""
        line.log.append(data)
        self.used[line] = None
        self.counts["sent"] += 1
        try:
            incarnation, sequence, frames = decode_batch(data)
        except _Failures:
            self._doom(line)
        else:
            if sequence != line.sent or (incarnation != line.incarnation and not line.is_left):
                self._doom(line)
            elif not line.is_left:
                for frame in frames:
                    # A Refused is not answered, not even for a greeting.
                    if isinstance(frame, Refused) or (isinstance(frame, _LAST_FRAMES) and line.sent):
                        self._doom(line, needs_reason=isinstance(frame, (Hello, Welcome)))
                        break
                    self.counts["questions"] += line.owe(frame)
        line.sent += 1
        line.connection.send(data)

    # ---- the transport's listener --------------------------------------------------------------------------------

    def accepted(self, connection: Connection) -> None:
        self._num_lines += 1
        line = Line("", f"fuzz-{self._num_lines}", connection)
        self._by_connection[connection] = self.accepted_lines[connection] = line

    def received(self, connection: Connection, batch: bytes) -> None:
        line = self._by_connection.get(connection)
        if line is None:
            return
        _, sequence, frames = decode_batch(batch)
        if sequence != line.received:
            self.problems.append(f"batch {sequence} came where {line.received} was due")
        line.received += 1
        line.has_heard = True
        for frame in frames:
            self._hear(line, frame)

    def _hear(self, line: Line, frame: AnyFrame) -> None:
        match frame:
            case Answer() | End() | Fail():
                self._ended(line, frame)
            case Items():
                self._items(line, frame)
            case Refused():
                line.has_reason = True
                self.counts["refused"] += 1
            case Hello():
                self._greet(line)
            case Post():
                self._asked(line, frame)
            case _:
                pass

    def _ended(self, line: Line, frame: Answer | End | Fail) -> None:
        if isinstance(frame, Fail):
            self.counts["fails"] += 1
        elif isinstance(frame, Answer):
            self.counts["answers"] += 1
            if self._rng.random() < 0.05:
                self._mutator.learn(decode(frame.body))
        call_id = frame.id
        if call_id in line.owed:
            line.owed[call_id] -= 1
            if not line.owed[call_id]:
                del line.owed[call_id]
                line.standing.discard(call_id)
                line.room.pop(call_id, None)
                line.forgiven.discard(call_id)
        elif not line.is_left:
            self.problems.append(f"an end for {call_id}, of which none was due: {frame}")

    def _items(self, line: Line, frame: Items) -> None:
        if frame.id not in line.owed:
            if not line.is_left:
                self.problems.append(f"items for {frame.id} after its end: {frame}")
            return
        items = decode(frame.body)
        self.counts["items"] += len(items)
        if self._rng.random() < 0.05:
            self._mutator.learn(items)
        if frame.id in line.room:
            line.room[frame.id] -= len(items)
            if line.room[frame.id] < 0:
                self.problems.append(f"items for {frame.id} without credit")

    def _asked(self, line: Line, post: Post) -> None:
        self.counts["asked here"] += 1
        line.calls.append(post.id)
        kinds = self._replies.get(decode(post.body)[0], [])
        if not kinds or self._rng.random() < 0.1 or line.is_left or not line.has_greeted:
            return
        replies = [self._reply(line, post.id, self._mutator.pick(kinds)) for _ in range(1 + (self._rng.random() < 0.5))]
        if self._rng.random() < 0.5:
            replies.append([7, post.id])
        self._put(line, encode((line.incarnation, line.sent, replies)))

    def closed(self, connection: Connection, reason: str) -> None:
        line = self._by_connection.pop(connection, None)
        if line is not None:
            line.is_closed = line.has_heard = True
            self._leave(line)

    # ---- ends ----------------------------------------------------------------------------------------------------

    def _doom(self, line: Line, *, needs_reason: bool = True) -> None:
        self.counts["malformed"] += needs_reason
        line.is_doomed, line.needs_reason = True, needs_reason
        self._leave(line)

    def _leave(self, line: Line) -> None:
        """Use a line no more; it is judged at the end of the burst."""
        if not line.is_left:
            line.is_left = True
            line.owed.clear()
            if line in self.lines:
                self.lines.remove(line)
            self.accepted_lines.pop(line.connection, None)
            self._left.append(line)

    def send_frames(self, endpoint: str, frames: bytes) -> None:
        """Greet over a new line, send a batch whose list of frames is these bytes, and leave it at that."""
        self._num_lines += 1
        line = Line(endpoint, f"fuzz-{self._num_lines}", self._transport.dial(endpoint))
        self._by_connection[line.connection] = line
        self.lines.append(line)
        name = f"node-{self._rng.getrandbits(64):016x}"
        hello = Hello(PROTOCOL_VERSION, self._fleet, name, line.incarnation, "")
        self._put(line, encode((line.incarnation, line.sent, [hello])))
        self._put(line, encode((line.incarnation, line.sent, msgspec.Raw(frames))))
        self._leave(line)

    def replay(self, endpoint: str, batches: list[bytes]) -> None:
        """Send what was sent over one line, over a new one."""
        line = Line(endpoint, "", self._transport.dial(endpoint))
        self._by_connection[line.connection] = line
        line.is_left = True
        for data in batches:
            line.connection.send(data)

    def _close(self, line: Line) -> None:
        self._by_connection.pop(line.connection, None)
        line.is_closed = line.has_heard = True
        line.connection.close()

    def waits(self) -> bool:
        """Return whether a line that was left has not heard what it must."""
        return any(
            (line.needs_reason and not line.has_reason) if line.is_doomed else not line.has_heard for line in self._left
        )

    def judge(self) -> None:
        """Look at what came of the lines that were left; to be called when the nodes have nothing more to do."""
        for line in self._left:
            is_cut = line.is_closed or (line.is_doomed and not line.needs_reason and not self._hears_cuts)
            if not is_cut and (line.is_doomed or not line.has_heard):
                self.problems.append(f"a link to {line.endpoint} was to be cut, and stands: {line.log[-1]!r:.2000}")
            elif line.is_doomed and line.needs_reason and not line.has_reason:
                self.problems.append(f"a link to {line.endpoint} was cut without a reason: {line.log[-1]!r:.2000}")
            self._close(line)
        self._left.clear()

    def debts(self) -> list[str]:
        """Return which questions have had no end; to be called when all deadlines have passed."""
        return [
            f"{line.endpoint or 'a link that a node dialled'} never ended {call_id}"
            for line in (*self.lines, *self.accepted_lines.values())
            for call_id in line.owed
            if call_id not in line.standing and call_id not in line.forgiven
        ]

    def close(self) -> None:
        """Leave every line."""
        for line in (*self.lines, *self.accepted_lines.values()):
            self._leave(line)
            self._close(line)
        self._left.clear()

    async def stop(self) -> None:
        self.close()
        await self._transport.stop()


def _is_question(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, (Ask, Stream)) and kind not in (Ask, Stream)


def _reply_kinds(kind: type, mutator: Mutator) -> list[str]:
    answers = answer_type(kind)
    frame = "Items" if issubclass(kind, Stream) else "Answer"
    names = [each.__name__ for each in getattr(answers, "__args__", (answers,))]
    return [name for name in (f"{frame}/{each}" for each in names) if mutator.has(name)]
