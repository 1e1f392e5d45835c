"""A request that is handed on to another router: its tokens come through, its end goes back, no circle is endless."""

import asyncio

import pytest

from callboard.actors.protocol import BadRequest
from callboard.router import NoRouter
from callboard.router.actor import RouterActor

HANDS_ON = """
async def route(request, fleet, *, to: str = "other"):
    async for token in fleet.router(to).generate(request):
        yield token
"""


async def two_routers(fleet, write_script, *, to="other", other="round_robin"):
    """Start the fleet's router, which hands all on, and another one, ``other``."""
    fleet.other = RouterActor(RouterActor.Config(name="other", script=other))
    await fleet.start(await fleet.node("elsewhere"), "other", fleet.other, fleet.directory)
    await fleet.add_router(write_script(HANDS_ON), options={"to": to})
    await fleet.router.view.wait_for(lambda view: any(each.name == "other" for each in view.entries))
    for name in fleet.engines:
        await fleet.other.view.wait_for(lambda view, name=name: any(each.name == name for each in view.entries))


async def test_the_tokens_of_the_other_router_come_through(fleet, write_script):
    engine = await fleet.add_engine("a")
    await two_routers(fleet, write_script)
    assert await fleet.generate("r") == [100, 101, 102]
    ((_, request_id, attempt, *_rest),) = engine.calls
    assert (request_id, attempt) == ("r", 1 << 20)
    assert fleet.is_clean()
    assert fleet.other.num_in_flight == 0


async def test_a_client_that_leaves_ends_it_at_the_other_router(fleet, write_script):
    engine = await fleet.add_engine("a")
    await two_routers(fleet, write_script)
    engine.token_s = 10.0
    task = asyncio.ensure_future(fleet.generate("r"))
    await asyncio.sleep(1.0)
    assert engine.num_open == 1
    task.cancel()
    await fleet.settle()
    assert engine.num_open == 0
    assert fleet.other.num_in_flight == 0
    assert fleet.is_clean()


async def test_a_router_that_dies_before_the_first_token_is_tried_again(fleet, write_script):
    engine = await fleet.add_engine("a")
    await two_routers(fleet, write_script)
    engine.token_s = 1.0
    task = asyncio.ensure_future(fleet.generate("r", max_tokens=2))
    await asyncio.sleep(0.1)
    await fleet.kill("elsewhere")
    again = RouterActor(RouterActor.Config(name="other", script="round_robin"))
    fleet.nodes.pop("elsewhere")
    await fleet.start(await fleet.node("elsewhere-2"), "other", again, fleet.directory)
    assert await task == [100, 101]
    first, *_, last = (call[2] for call in engine.calls)
    assert first == 1 << 20
    assert last > first
    await fleet.settle()
    assert fleet.is_clean()


async def test_routers_that_hand_on_in_a_circle_refuse_the_request(fleet, write_script):
    await fleet.add_engine("a")
    await two_routers(fleet, write_script, to="main")
    with pytest.raises(BadRequest, match="from router to router too often"):
        await fleet.generate()
    await fleet.settle()
    assert fleet.is_clean()


async def test_a_router_that_is_not_there_is_named(fleet, write_script):
    await fleet.add_engine("a")
    await fleet.add_router(write_script(HANDS_ON), options={"to": "a"})
    await fleet.router.view.wait_for(lambda view: any(each.name == "main" for each in view.entries))
    with pytest.raises(NoRouter, match=r"no router 'a' \(known: main\)"):
        await fleet.generate()


async def test_a_router_that_comes_soon_is_waited_for(fleet, write_script):
    await fleet.add_engine("a")
    await fleet.add_router(write_script(HANDS_ON))
    task = asyncio.ensure_future(fleet.generate("r"))
    await asyncio.sleep(1.0)
    other = RouterActor(RouterActor.Config(name="other", script="round_robin"))
    await fleet.start(await fleet.node("elsewhere"), "other", other, fleet.directory)
    assert await task == [100, 101, 102]
    assert fleet.is_clean()
