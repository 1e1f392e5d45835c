"""Events that were never made, and recordings of them."""

from pathlib import Path
from typing import Any

import msgspec

from callboard.actors.protocol import Entry
from callboard.bus import Address
from callboard.bus.taps import SENT, SPAN, TapRecord
from callboard.tools.trace.event import Event, event_of
from callboard.tools.trace.recording import (
    Header,
    Recording,
)
from callboard.tools.trace.recording_writer import RecordingWriter

HEADER = Header("abc", 0, "test", "0.1.0", 1000.0, "hashed")
ENTRY = Entry("decode", "engine", Address("decode", "ipc:///x", "decode"), model="tiny")
NIL = msgspec.Raw(b"\xc0")


def record(number: int, *, body: bytes = b"\xc0", facts: dict[str, Any] | None = None) -> TapRecord:
    packed = msgspec.Raw(msgspec.msgpack.encode(facts or {"n": number}))
    what = SPAN if number % 3 == 0 else SENT
    begin = number / 10 if what == SPAN else 0.0
    return TapRecord(
        *(what, 0.5 + number / 10, begin, "decode", "main", "control", "StartGenerate", f"request-{number // 4}"),
        *(number, 0, 100, 0, 0.0, "", packed, msgspec.Raw(body)),
    )


def events(count: int, begin: int = 0, *, node: str = "control", body: bytes = b"\xc0") -> list[Event]:
    return [event_of(record(n, body=body), node, offset_s=5.0, wall_s=1e9) for n in range(begin, begin + count)]


def writer(path: Path, **options: Any) -> RecordingWriter:
    return RecordingWriter(path, HEADER, now=lambda: 7.0, wall=lambda: 1007.0, **options)


def written(path: Path, count: int = 40) -> Path:
    with writer(path) as file:
        file.view((ENTRY,))
        for begin in range(0, count, 10):
            file.add(events(10, begin))
            file.flush()
        file.notice("lost", "control", "records were lost", num_lost=3)
    return path


def numbers(recording: Recording) -> list[int]:
    return [event.record.span for event in recording.events]
