"""Scripts that catch their cancellation and go on: after a while they are given up, and keep nothing of the router."""

import asyncio
import logging

import pytest
from swapping import LINE_OF_BODY, look, set_script, text_of

from callboard.bus import ActorDied, AskTimeout
from callboard.router import QueueFull, ScriptError
from callboard.router.in_flight import GIVEN_UP_S

WAITS = """
async def route(request, fleet):
    async with fleet.decode[0].prep_recv(request) as kv:
        while not fleet.released:
            try:
                await asyncio.sleep(1.0)
            except asyncio.CancelledError:
                pass
    yield
"""
GENERATES = """
async def route(request, fleet):
    tokens = fleet.engines[0].start_generate(request)
    while not fleet.released:
        task = asyncio.ensure_future(anext(tokens))
        while not task.done():
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError:
                pass
        yield task.result()
"""


@pytest.fixture(autouse=True)
async def released(monkeypatch):
    """Scripts go on until this list has something in it: they reach it as ``fleet.released``."""
    from callboard.router.fleet import Fleet as SeenFleet

    found = []
    monkeypatch.setattr(SeenFleet, "released", found, raising=False)
    yield found
    found.append("now")
    await asyncio.sleep(10.0)


async def leave(fleet, request_id="r", after_s=0.1, **fields):
    """Ask for something, and leave."""
    task = asyncio.ensure_future(fleet.generate(request_id, **fields))
    await asyncio.sleep(after_s)
    task.cancel()
    await asyncio.wait([task])


async def test_its_place_goes_to_another_and_what_it_has_taken_is_given_back(fleet, write_script, caplog):
    await fleet.add_two(write_script(WAITS), max_queue=1)
    await leave(fleet)
    await asyncio.sleep(GIVEN_UP_S / 2)
    with pytest.raises(QueueFull):
        await fleet.generate("early")
    assert fleet.managers["kv-decode"].reserved
    await asyncio.sleep(GIVEN_UP_S)
    assert fleet.is_clean()
    [line] = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert f"script.py:{LINE_OF_BODY + 5}: it has gone on for 10 s after its request was cancelled" in line
    assert "is given up, and may ask for nothing more" in line


async def test_a_deadline_that_it_catches_ends_the_request_all_the_same(fleet, write_script):
    await fleet.add_two(write_script(WAITS), max_queue=1, deadline_s=5.0)
    with pytest.raises(ScriptError, match="gone on for 10 s after"):
        await fleet.generate("r", timeout=100.0)
    await fleet.settle()
    assert fleet.is_clean()


async def test_a_script_that_ends_in_order_after_its_cancellation_is_not_to_blame(fleet, write_script):
    body = """
async def route(request, fleet):
    try:
        await asyncio.sleep(1e6)
    finally:
        await asyncio.sleep(5.0)
    yield
"""
    await fleet.add_two(write_script(body), max_queue=1)
    await leave(fleet)
    await asyncio.sleep(3 * GIVEN_UP_S)
    assert fleet.is_clean()
    [version] = (await look(fleet)).versions
    assert (version.num_failures, version.num_in_flight) == (0, 0)


async def test_it_counts_as_a_failure_once_for_each_request_and_is_rolled_back(fleet):
    await fleet.add_two("least_loaded")
    await set_script(fleet, text_of(WAITS))
    for number in range(3):
        await leave(fleet, f"r{number}")
    await asyncio.sleep(3 * GIVEN_UP_S)
    report = await look(fleet)
    assert (report.change.what, report.change.active.name) == ("failed", "least_loaded")
    assert [(each.num_failures, each.num_in_flight) for each in report.versions] == [(0, 0), (3, 0)]
    assert "Raise every CancelledError again" in report.change.why
    assert await fleet.generate("again") == [100, 101, 102]


async def test_none_of_its_tokens_goes_anywhere_once_its_request_has_ended(fleet, write_script):
    await fleet.add_engine("a")
    await fleet.add_router(write_script(GENERATES))
    fleet.engines["a"].token_s = 0.1
    before = asyncio.all_tasks()
    await leave(fleet, after_s=0.35, max_tokens=1000)
    await asyncio.sleep(0.3)
    # It goes on reading; with the first token that it yields it is over.
    assert fleet.is_clean()
    assert not {task for task in asyncio.all_tasks() - before if task.get_name() == "main"}


async def test_one_that_is_given_up_can_ask_for_nothing_more(fleet, write_script):
    body = """
async def route(request, fleet):
    try:
        await asyncio.sleep(1e6)
    except asyncio.CancelledError:
        pass
    try:
        await asyncio.sleep(1e6)
    except asyncio.CancelledError:
        fleet.engines[0].pick()
    yield
"""
    await fleet.add_engine("a")
    await fleet.add_router(write_script(body))
    await leave(fleet)
    await asyncio.sleep(3 * GIVEN_UP_S)
    assert fleet.is_clean()
    assert not fleet.engines["a"].calls


async def test_deaths_and_deadlines_that_are_let_through_are_as_before(fleet, write_script):
    body = WAITS.replace("except asyncio.CancelledError", "except KeyError")
    await fleet.add_two(write_script(body), deadline_s=5.0)
    with pytest.raises(AskTimeout, match="passed its deadline"):
        await fleet.generate("r", timeout=100.0)
    fleet.engines["decode"].error = ActorDied("planted")
    await fleet.settle()
    assert fleet.is_clean()


async def test_a_death_behind_its_clients_leaving_is_no_reason_for_another_attempt(fleet, write_script):
    body = """
async def read(tokens):
    return [token async for token in tokens]

async def route(request, fleet):
    task = asyncio.ensure_future(read(fleet.engines[0].start_generate(request)))
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            pass
    yield task.result()
"""
    await fleet.add_engine("a")
    await fleet.add_router(write_script(body))
    engine = fleet.engines["a"]
    engine.token_s, engine.error, engine.fails_at = 1.0, ActorDied("planted"), 1
    await leave(fleet)
    await asyncio.sleep(3 * GIVEN_UP_S)
    assert [call[0] for call in engine.calls] == ["start_generate"]
    assert fleet.is_clean()
    [version] = (await look(fleet)).versions
    assert (version.num_requests, version.num_in_flight) == (1, 0)


async def test_one_that_leaves_many_scopes_at_a_peer_that_hangs_is_not_to_blame(fleet, write_script, caplog):
    body = """
from contextlib import AsyncExitStack

async def route(request, fleet):
    async with AsyncExitStack() as stack:
        for _ in range(8):
            await stack.enter_async_context(fleet.decode[0].prep_recv(request))
        await asyncio.sleep(1e6)
    yield
"""
    await fleet.add_two(write_script(body), max_queue=1)
    fleet.managers["kv-decode"].release_s = 1e6
    await leave(fleet)
    await asyncio.sleep(3 * GIVEN_UP_S)
    [version] = (await look(fleet)).versions
    assert (version.num_failures, version.num_in_flight, fleet.router.num_in_flight) == (0, 0, 0)
    assert not [record for record in caplog.records if record.levelno == logging.ERROR]
