"""Recordings that somebody made up: whole chunks, full of what no fleet ever said."""

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from callboard.actors.protocol import Entry, Load
from callboard.bus import Address
from callboard.bus.taps import NO_FACTS, SENT, SPAN, TapRecord
from callboard.tools.errors import CliError
from callboard.tools.replay.costs import CostsOf
from callboard.tools.replay.tape import read_tape
from callboard.tools.trace.event import event_of
from callboard.tools.trace.recording import Batch, End, FleetView, Header, file_head, pack_chunk

NUM_EXAMPLES = int(os.environ.get("CALLBOARD_TEST_EXAMPLES", "40"))
NAMES = ["Generate", "PrepRecv", "RemoteSend", "StartGenerate", "OpenWrite", "Admit"]
NAMES += ["prefill", "compute", "decode", "send", "blocks", "attempt"]
FACTS = ["num_tokens", "num_steps", "step_s", "between_s", "step_decodes", "step_prefill_tokens", "num_bytes", "begin"]
FACTS += ["end", "engine", "to", "options", "version", "num_cached_tokens"]

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.sampled_from(["", "d0", "[]", '{"a": 1}', "{", "é" * 40]),
)
times = st.floats(-1e12, 1e12) | st.sampled_from([0.0, 1.0, 1.5, 2.0])
small = st.integers(0, 6)
values = st.recursive(
    scalars | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
counts = st.integers(0, 40) | st.integers()
hashed = st.fixed_dictionaries({"num_tokens": counts, "block_size": st.just(16) | counts, "hashes": st.binary()})
sound_prompts = st.just({"num_tokens": 20, "block_size": 16, "hashes": bytes(16)}) | st.just(bytes(8))
sound = st.fixed_dictionaries(
    {
        "request_id": st.sampled_from(["r1", "r1.1", "r2"]),
        "model": st.just("tiny"),
        "prompt": sound_prompts,
        "sampling": st.just([4]),
    }
)
odd = st.fixed_dictionaries(
    {"request_id": st.just("r1") | values, "model": st.just("tiny") | values},
    optional={"prompt": st.binary() | hashed | values, "sampling": st.just([4]) | values, "kv": values},
)
bodies = st.none() | sound | odd


@st.composite
def records(draw: Any) -> TapRecord:
    numbers = st.integers(1, 50) | scalars
    packed = {name: draw(numbers) for name in draw(st.lists(st.sampled_from(FACTS), max_size=9, unique=True))}
    try:
        facts, body = msgspec.msgpack.encode(packed), msgspec.msgpack.encode(draw(bodies))
    except (OverflowError, ValueError):
        facts, body = b"\x80", b"\xc0"
    return TapRecord(
        *(
            draw(st.integers(0, 4) | st.integers(-1, 6)),
            draw(times),
            draw(times),
            draw(st.sampled_from(["main", "d0", ""])),
            "",
            "control",
        ),
        *(draw(st.sampled_from(NAMES)), draw(st.sampled_from(["", "r1", "r1.1", "r2"])), draw(small), draw(small)),
        *(
            draw(st.integers(-5, 5)),
            draw(st.integers(-5, 2**62)),
            draw(times),
            draw(st.sampled_from(["", "cancelled", "x"])),
        ),
        *(msgspec.Raw(facts), msgspec.Raw(body)),
    )


@st.composite
def entries(draw: Any) -> Entry:
    kind = draw(st.sampled_from(["engine", "engine", "router", "router", "kv_manager", "other"]))
    address = Address("n", "sim://n", "a")
    detail = draw(
        st.dictionaries(st.sampled_from(["block_size", "max_num_seqs", "script", "path"]), st.text(max_size=5))
    )
    manager = draw(st.sampled_from([None, address, address, address]))
    load = Load(num_blocks=draw(st.integers(-5, 2**60)))
    return Entry(draw(st.text(max_size=3)), kind, address, model="tiny", manager=manager, detail=detail, load=load)


@settings(max_examples=NUM_EXAMPLES, deadline=None)
@given(seen=st.lists(records(), min_size=15, max_size=60), view=st.lists(entries(), max_size=5), offset=times)
def test_whatever_a_recording_says_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, seen: list[TapRecord], view: list[Entry], offset: float
) -> None:
    path: Path = tmp_path_factory.getbasetemp() / "made-up.rec"
    chunks = (
        Header("x", 0, "made up", "0", 0.0, "hashed"),
        FleetView(0.0, tuple(view)),
        Batch("control", offset, 0.0, 0.0, tuple(seen)),
        End(0.0, "", len(seen), 0),
    )
    body = {"request_id": "r0", "model": "tiny", "prompt": bytes(8), "sampling": [4]}
    raw = msgspec.Raw(msgspec.msgpack.encode(body))
    asked = (SENT, 1.0, 0.0, "main", "frontend", "control", "Generate", "r0", 99, 0, 0, 0, 0.0, "", NO_FACTS, raw)
    chunks = (*chunks[:2], Batch("control", 0.0, 0.0, 0.0, (TapRecord(*asked),)), *chunks[2:])
    path.write_bytes(file_head() + b"".join(pack_chunk(chunk) for chunk in chunks))
    tape = read_tape(str(path), is_partial=True, limit=None, show=lambda text: None)
    assert "r0" in [request.id for request in tape.requests]
    for request in tape.requests:
        assert request.message("again").request_id == "again"
    for fit in (*tape.costs.engines.values(), tape.costs.others):
        assert all(0 <= cost < float("inf") for cost in fit.costs)
    assert 0 <= tape.costs.latency_s < float("inf")
    try:
        shape = tape.shape.shape()
    except CliError as error:
        sentence = str(error)
    else:
        sentence = ""
        assert all(2 <= manager.num_blocks <= 4_000_000 for manager in shape.managers)
    assert "\n" not in sentence


PHASE_FACTS = ("num_steps", "step_s", "between_s", "step_decodes", "step_prefill_tokens")
numbers = st.integers(1, 50) | st.floats(0.0, 10.0) | scalars


@settings(max_examples=NUM_EXAMPLES, deadline=None)
@given(rows=st.lists(st.tuples(*[numbers] * len(PHASE_FACTS), numbers, times), min_size=8, max_size=30))
def test_costs_are_costs_whatever_phases_and_sends_are_said_to_have_taken(rows: list[tuple[Any, ...]]) -> None:
    costs = CostsOf()
    for number, (*values, num_bytes, time) in enumerate(rows):
        phase = dict(zip(PHASE_FACTS, values, strict=True))
        for name, facts in (("decode", phase), ("send", {"num_bytes": num_bytes, "to": "kv"})):
            raw = msgspec.Raw(msgspec.msgpack.encode(facts))
            head = (SPAN, time, 1.0, "d0", "", "", name, "r", number, 0, 0, 0, 0.0, "")
            costs.add(event_of(TapRecord(*head, raw, msgspec.Raw(b"\xc0")), "d0"))
    fitted = costs.fit()
    for fit in (*fitted.engines.values(), fitted.others):
        assert all(0 <= cost < float("inf") for cost in (*fit.costs, fit.gap_s))
    for pages in (*fitted.pages.values(), fitted.other_pages):
        assert pages.bytes_per_s > 0
        assert 0 <= pages.seconds_per_send < float("inf")
