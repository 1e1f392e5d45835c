"""The routers as a frontend has them: who is asked, what is told of them, and when clients are to come again."""

import asyncio
from typing import Any

import pytest
from served_fleet import samples_of, value
from waiting import PATIENCE_S, until

from callboard.actors.actor import start_actor, stop_actor
from callboard.actors.frontend.routers import LONGEST_RETRY_S, WINDOW_S, Turnover
from callboard.bus import Node


async def restarted(door: Any, router: Any) -> Any:
    """Start the router anew, where it was."""
    old = router.node
    node = Node(old.name, endpoint=old.endpoint, transport=old.transport.hub.transport())
    await node.__aenter__()
    again = type(router)(router.tokenizer)
    await start_actor(node, router.name, again)
    door.routers.append(again)
    return again


@pytest.mark.parametrize("num_sent", [0, 1])
async def test_while_the_only_router_restarts_requests_wait(open_door: Any, num_sent: int) -> None:
    door = await open_door(patience_s=PATIENCE_S)
    door.router.says(*["Hello"] * num_sent, 30.0)
    request = asyncio.ensure_future(door.complete())
    await until(lambda: door.router.asked and door.router.num_sent >= num_sent)
    await asyncio.sleep(0.02)
    await door.router.node.stop()
    late = asyncio.ensure_future(door.complete())
    await asyncio.sleep(0.1)
    assert not request.done()
    assert not late.done()
    again = await restarted(door, door.router)
    again.says("Hello world")
    for reply in (await request, await late):
        assert reply.json()["choices"][0]["text"] == "Hello world"
    assert {message.num_output_tokens for message in again.asked} == {0, num_sent}
    await again.node.stop()


async def test_a_router_that_does_not_come_back_is_not_waited_for_for_ever(open_door: Any) -> None:
    door = await open_door(patience_s=0.3)
    await door.router.node.stop()
    reply = await door.complete()
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "unavailable")
    assert "retry-after" in reply.headers


async def test_those_of_a_name_are_asked_while_they_are_there(open_door: Any) -> None:
    door = await open_door(num_routers=3, routers=("router-0", "router-2"), patience_s=0.3)

    async def missing() -> list[str]:
        return [each for each in (await door.http.get("/health/ready")).json()["missing"] if "router" in each]

    for _ in range(4):
        assert (await door.complete()).status_code == 200
    assert [len(router.asked) for router in door.routers] == [2, 0, 2]
    await stop_actor(door.routers[0])
    await until(lambda: len(door.frontend._routers.there()) == 1)
    assert await missing() == []
    for _ in range(2):
        assert (await door.complete()).status_code == 200
    assert [len(router.asked) for router in door.routers] == [2, 0, 4]
    samples = samples_of((await door.http.get("/metrics")).text)
    asked = {name: value(samples, "callboard_router_sequences_total", router=name) for name in ("router-0", "router-2")}
    assert asked == {"router-0": 2.0, "router-2": 4.0}
    assert value(samples, "callboard_router_inflight_sequences", router="router-2") == 0.0
    await stop_actor(door.routers[2])
    await until(lambda: not door.frontend._routers.there())
    assert await missing() == ["none of the routers router-0, router-2 is there"]
    reply = await door.complete()
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "unavailable")
    assert "none of the routers" in reply.json()["error"]["message"]


async def test_a_router_that_is_being_emptied_or_that_was_lost_just_now_is_asked_last(open_door: Any) -> None:
    door = await open_door(num_routers=2)
    first, second = door.routers
    first.registration.update(state="draining")
    await until(lambda: len(door.frontend._routers.there()) == 1)
    for _ in range(3):
        assert (await door.complete()).status_code == 200
    assert (len(first.asked), len(second.asked)) == (0, 3)
    first.registration.update(state="ready")
    await until(lambda: len(door.frontend._routers.there()) == 2)
    door.frontend._routers.suspect(second.ref.address)
    for _ in range(3):
        assert (await door.complete()).status_code == 200
    assert (len(first.asked), len(second.asked)) == (3, 3)
    second.registration.update(started=second.registration.entry.started + 1)  # As one that came back has it.
    await until(lambda: door.frontend._routers.pick(["router-0"]) is not None)


def test_who_is_sent_away_is_told_to_come_when_there_may_be_room() -> None:
    idle = Turnover(0.0)
    assert idle.refused(0.2) == 1
    assert idle.refused(9.5) == 10, "nothing has ended for so long"
    assert idle.refused(1000.0) == WINDOW_S
    fast = Turnover(0.0)
    for tick in range(100):
        fast.ended(tick / 10)
    assert fast.refused(10.0) == 1
    slow = Turnover(0.0)
    for second in (2, 4, 6, 8, 10):
        slow.ended(float(second))
    assert [slow.refused(10.0 + number / 100) for number in range(4)] == [2, 5, 7, 9]
    for number in range(200):
        last = slow.refused(11.0 + number / 1000)
    assert last == LONGEST_RETRY_S
    assert slow.refused(100.0) == WINDOW_S, "what is long ago does not count"
