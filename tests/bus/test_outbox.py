"""What is posted on a link arrives once and in order, however it is cut into batches."""

import asyncio
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from callboard.bus import outbox
from callboard.bus.frames import MAX_BATCH_BYTES, MAX_FRAME_BYTES, Answer, Credit, End, Items, decode_batch
from callboard.bus.outbox import EARLY_BYTES, Outbox
from callboard.bus.testing import run_virtual


class Sink:
    """A connection that takes what it is given, while it has room."""

    def __init__(self, refusals: list[bool] | None = None) -> None:
        self.batches: list[bytes] = []
        self._refusals = refusals or []

    def send(self, batch: bytes | bytearray) -> bool:
        if self._refusals and self._refusals.pop():
            return False
        self.batches.append(bytes(batch))
        return True

    def close(self) -> None:
        return

    def heard(self) -> list[Any]:
        """Return all that arrived, items one by one; batches must be numbered, and no larger than they may be."""
        heard: list[Any] = []
        for number, batch in enumerate(self.batches):
            incarnation, sequence, frames = decode_batch(batch)
            assert (incarnation, sequence) == ("me", number)
            assert len(batch) <= MAX_BATCH_BYTES or len(frames) == 1
            for frame in frames:
                if isinstance(frame, Items):
                    heard += [(frame.id, item) for item in msgspec.msgpack.decode(frame.body)]
                else:
                    heard.append(frame if not isinstance(frame, Answer) else msgspec.msgpack.decode(frame.body))
        return heard


def open_outbox(sink: Sink) -> Outbox:
    box = Outbox(msgspec.msgpack.Encoder().encode_into, "me", 1 << 30)
    box.connection, box.is_open = sink, True
    return box


SIZES = st.one_of(st.integers(0, 300), st.integers(0, 2 * MAX_BATCH_BYTES), st.just(EARLY_BYTES))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("item"), st.integers(1, 3), SIZES),
        st.tuples(st.just("answer"), st.just(0), SIZES),
        st.tuples(st.sampled_from(["end", "pass", "later", "bad item", "bad answer"]), st.integers(1, 3), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(steps=STEPS, refusals=st.lists(st.booleans(), max_size=20), opens_at=st.integers(0, 20))
def test_whatever_is_posted_arrives_once_and_in_order(
    steps: list[tuple[str, int, int]], refusals: list[bool], opens_at: int
) -> None:
    async def run() -> None:
        sink = Sink(refusals)
        box = open_outbox(sink)
        box.is_open = False
        said: list[Any] = []
        for at, (step, stream, size) in enumerate(steps):
            if at == opens_at:
                box.is_open = True
                box.schedule_flush()
            match step:
                case "item":
                    box.post_item(stream, "x" * size)
                    said.append((stream, "x" * size))
                case "answer":
                    box.post(Answer(7, "y" * size))  # type: ignore[arg-type]
                    said.append("y" * size)
                case "end":
                    box.post(End(stream))
                    said.append(End(stream))
                case "pass":
                    await asyncio.sleep(0)
                case "later":
                    await asyncio.sleep(1)
                case "bad item":
                    with pytest.raises(TypeError):
                        box.post_item(stream, ["begins well", object()])
                case "bad answer":
                    with pytest.raises(TypeError):
                        box.post(Answer(7, ["begins well", object()]))  # type: ignore[arg-type]
        box.is_open = True
        box.schedule_flush()
        await asyncio.sleep(1)
        assert sink.heard() == said

    run_virtual(run)


def test_a_message_that_is_too_large_is_refused_and_the_others_go() -> None:
    async def run() -> None:
        sink = Sink()
        box = open_outbox(sink)
        large = "z" * (MAX_FRAME_BYTES + 1)
        box.is_open = False
        for _ in range(2):
            box.post_item(1, "a")
            with pytest.raises(ValueError, match="too large"):
                box.post_item(1, large)
            with pytest.raises(ValueError, match="too large"):
                box.post_item(2, large)
            box.post_item(1, "b")
            with pytest.raises(ValueError, match="too large"):
                box.post(Answer(7, large))  # type: ignore[arg-type]
            box.post(Credit(1, 1))
        box.is_open = True
        box.schedule_flush()
        await asyncio.sleep(0.1)
        assert sink.heard() == [(1, "a"), (1, "b"), Credit(1, 1)] * 2

    run_virtual(run)


def test_a_single_frame_leaves_at_once_and_a_busy_pass_leaves_together() -> None:
    async def run() -> None:
        sink = Sink()
        box = open_outbox(sink)
        box.post(End(1))
        assert len(sink.batches) == 1
        for _ in range(5):
            box.post(End(1))
        await asyncio.sleep(0)
        assert len(sink.batches) == 2
        box.post(End(1))
        assert len(sink.batches) == 2, "the pass before was busy"
        await asyncio.sleep(0)
        assert len(sink.batches) == 3
        box.post(End(1))
        assert len(sink.batches) == 4

    run_virtual(run)


def test_much_of_one_pass_begins_to_leave_before_its_end() -> None:
    async def run() -> None:
        sink = Sink()
        box = open_outbox(sink)
        for _ in range(3 * EARLY_BYTES // 1000 + 3):
            box.post(Answer(7, "x" * 1000))  # type: ignore[arg-type]
        assert len(sink.batches) >= 3
        assert all(len(batch) < EARLY_BYTES + 1100 for batch in sink.batches)
        sink.batches.clear()
        for _ in range(4 * MAX_BATCH_BYTES // 1000):
            box.post_item(1, "x" * 1000)
        assert len(sink.batches) >= 3

    run_virtual(run)


def test_too_much_that_waits_is_told_of() -> None:
    async def run() -> None:
        box = outbox.Outbox(msgspec.msgpack.Encoder().encode_into, "me", 10 * MAX_BATCH_BYTES)
        told: list[Any] = []
        box.on_overflow = told.append
        box.connection, box.is_open = Sink([True] * 1000), True
        for _ in range(12 * MAX_BATCH_BYTES // 1000):
            box.post_item(1, "x" * 1000)
        await asyncio.sleep(0)
        assert told
        assert told[0] is box

    run_virtual(run)
