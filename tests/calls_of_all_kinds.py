"""Messages of every kind, for tests that script a call's far side, and what must be left after their ends."""

import asyncio
from typing import Any

import msgspec

from callboard.bus import Ask, Node, Refusal, Stream, Tell

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


def assert_nothing_is_left(node: Node, tasks_before: set[asyncio.Task[Any]]) -> None:
    for link in node._links._links:
        assert not link.asked
        assert not link.served
    assert not node._server._serving
    assert not node.deadlines._slots
    assert asyncio.all_tasks() == tasks_before
