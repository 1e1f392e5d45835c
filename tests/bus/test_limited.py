"""Work that may not end, in a thread of its own: it is interrupted, but not in the middle of what others need too."""

import asyncio
import time
from typing import Any

import pytest
from waiting import until

from callboard.bus.limited import LimitedWork, Unfinished

GUEST = "<guest>"
LONG_S = 1.0


def guest_of(frame: Any) -> str | None:
    return GUEST if frame.f_code.co_filename == GUEST else None


async def test_what_a_guest_has_called_of_ours_comes_to_its_end_before_it_is_interrupted() -> None:
    names: dict[str, Any] = {"__name__": "callboard.of.ours"}
    step = "def step(books):\n    books.append('begun')\n    for _ in range(100000): pass\n    books.append('ended')\n"
    exec(compile(step, "ours.py", "exec"), names)
    books: list[str] = []
    known: dict[str, Any] = {"step": names["step"], "books": books, "until": time.monotonic() + LONG_S, "time": time}
    loop = "def run():\n    while time.monotonic() < until:\n        step(books)\n"
    exec(compile(loop, GUEST, "exec"), known)
    work = LimitedWork(known["run"], is_inline=False)
    with pytest.raises(Unfinished):
        await work.result(0.1, guest_of)
    await until(lambda: not work.is_going_on)
    assert books[-1] == "ended"
    assert len(books) > 2


async def test_who_has_ended_is_not_interrupted_in_whoever_has_its_ident_now() -> None:
    work = LimitedWork(int, is_inline=False)
    assert await work.result(10.0, guest_of) == 0
    await until(lambda: not work.is_going_on)
    known: dict[str, Any] = {"sleep": time.sleep}
    exec(compile("def run():\n    for _ in range(20): sleep(0.01)\n    return 'all'\n", GUEST, "exec"), known)
    other = LimitedWork(known["run"], is_inline=False)
    result = asyncio.ensure_future(other.result(10.0, guest_of))
    await until(lambda: other.is_going_on)
    if other._thread.ident != work._thread.ident:
        work._thread._ident = other._thread.ident  # type: ignore[attr-defined]
    assert not work._interrupt(guest_of)
    assert await result == "all"
