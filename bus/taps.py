"""Taps: one record per message at a node, for whoever watches. Detached, a tap is one attribute test."""

from collections import deque
from typing import Protocol

import msgspec


class TapRecord(msgspec.Struct, frozen=True, array_like=True):
    """A message as one node saw it. ``time`` is that node's monotonic seconds."""

    time: float
    direction: str
    """sent or received"""
    peer: str
    actor: str
    kind: str
    request_id: str


class Tap(Protocol):
    """What a node calls for each message."""

    def __call__(self, time: float, direction: str, peer: str, actor: str, kind: str, request_id: str) -> None: ...


class Ring:
    """A tap that keeps the last ``limit`` records."""

    def __init__(self, limit: int = 10_000) -> None:
        self.records: deque[TapRecord] = deque(maxlen=limit)

    def __call__(self, time: float, direction: str, peer: str, actor: str, kind: str, request_id: str) -> None:
        self.records.append(TapRecord(time, direction, peer, actor, kind, request_id))
