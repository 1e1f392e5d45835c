"""The message log in words: time, from, to, what, and for which request."""

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from callboard.bus.frames import decode_batch


def lines_of(entries: Iterable[tuple[Any, ...]]) -> Iterator[str]:
    """Yield a line for each event, each message that a node's tap saw, and each frame that went over the network."""
    for entry in entries:
        time, *rest = entry
        if rest[0] == "***":
            yield f"{time:12.6f} *** {rest[1]}"
        elif isinstance(rest[-1], bytes):
            near, far, batch = rest
            for what in _frames(batch):
                yield f"{time:12.6f}     {near.removeprefix('sim://')} -> {far.removeprefix('sim://')} {what}"
        else:
            node, what, peer, actor, kind, request_id, error = rest
            arrow = {"sent": f"{node} -> {peer}", "received": f"{node} <- {peer}"}.get(what, f"{node} {what}")
            yield f"{time:12.6f} {arrow} {actor} {kind} {request_id} {error}".rstrip()


def _frames(batch: bytes) -> Iterator[str]:
    incarnation, sequence, frames = decode_batch(batch)
    for frame in frames:
        kind = type(frame).__name__
        number = getattr(frame, "id", "")
        more = ""
        body = getattr(frame, "body", None)
        if body is not None:
            decoded = msgspec.msgpack.decode(body)
            more = " " + _short(decoded)
        elif kind == "Fail":
            more = f" {frame.kind} {frame.text}"
        elif kind == "Credit":
            more = f" {frame.count}"
        yield f"[{incarnation[:4]} {sequence}] {kind} {number}{more}".rstrip()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 160 else text[:157] + "..."
