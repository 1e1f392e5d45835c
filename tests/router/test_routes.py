"""Versions of a router's script: who takes which, who keeps his own, the way back, and what is told of it."""

import asyncio

import pytest
from swapping import FAILING, LINE_OF_BODY, change, changer, look, served, set_script, text_of, to

from callboard.actors.actor import stop_actor
from callboard.bus import ActorDied, AskTimeout
from callboard.kv.layout import OutOfBlocks
from callboard.router import NoEngine, ScriptError
from callboard.router.errors import RouteRefused
from callboard.router.script import read_script


@pytest.fixture
async def two(fleet):
    """Engines "a" and "b", and a router whose script takes "a"."""
    await fleet.add_engine("a")
    await fleet.add_engine("b")
    await fleet.add_router("least_loaded")
    await set_script(fleet, to("a"))
    return fleet


async def test_requests_in_flight_finish_under_their_script_and_new_ones_take_the_new_one(two):
    async with two.stream("old", max_tokens=50) as tokens:
        ids = [(await anext(tokens)).id]
        await set_script(two, to("b"))
        assert await two.generate("new") == [100, 101, 102]
        ids += [token.id async for token in tokens]
    assert ids == list(range(100, 150))
    assert served(two) == {"a": ["old"], "b": ["new"]}


async def test_a_later_attempt_keeps_the_script_it_began_with(two):
    two.engines["a"].error, two.engines["a"].fails_at = ActorDied("planted"), 40
    task = asyncio.ensure_future(two.generate("r", max_tokens=60))
    await asyncio.sleep(0.01)
    await set_script(two, to("b"))
    await asyncio.sleep(0.1)
    two.engines["a"].error = None
    assert len(await task) == 60
    assert served(two) == {"a": ["r", "r"], "b": []}


async def test_a_later_attempt_leaves_a_script_that_was_rolled_back_for_failing(two):
    body = """
async def route(request, fleet):
    if request.id.startswith("bad"):
        raise KeyError("planted")
    async for token in next(e for e in fleet.engines if e.name == "a").start_generate(request):
        yield token
"""
    await set_script(two, to("b"))
    await set_script(two, text_of(body))
    two.engines["a"].error, two.engines["a"].fails_at = ActorDied("planted"), 40
    task = asyncio.ensure_future(two.generate("r", max_tokens=60))
    await asyncio.sleep(0.01)
    for number in range(3):
        with pytest.raises(ScriptError):
            await two.generate(f"bad-{number}")
    await task
    assert served(two) == {"a": ["r"], "b": ["r"]}


async def test_a_script_that_fails_too_often_is_rolled_back_and_the_history_says_why(two):
    await set_script(two, text_of(FAILING, "broken"))
    for number in range(3):
        with pytest.raises(ScriptError):
            await two.generate(f"r{number}")
    assert await two.generate("after") == [100, 101, 102]
    report = await look(two)
    last = report.history[-1]
    assert (last.what, last.by, report.change.active.name) == ("failed", "router main", "to_a")
    line = LINE_OF_BODY + 2
    assert last.why == f"/home/me/broken.py:{line} in route: raise KeyError(\"planted\")\nKeyError: 'planted'"
    broken = next(each for each in report.versions if each.script.name == "broken")
    assert (broken.num_requests, broken.num_failures, broken.is_rolled_back) == (3, 3, True)


async def test_a_script_that_was_set_twice_is_not_rolled_back_to_itself(two):
    for _ in range(2):
        await set_script(two, text_of(FAILING))
    for number in range(3):
        with pytest.raises(ScriptError):
            await two.generate(f"r{number}")
    assert (await look(two)).change.active.name == "to_a"


async def test_failures_that_are_spread_thin_roll_nothing_back(two):
    body = """
async def route(request, fleet):
    if request.id.startswith("bad"):
        raise KeyError("planted")
    async for token in fleet.engines[0].start_generate(request):
        yield token
"""
    await set_script(two, text_of(body))
    for number in range(66):  # Two of any twenty.
        if number % 11 == 0:
            with pytest.raises(ScriptError):
                await two.generate(f"bad-{number}")
        else:
            await two.generate(f"r{number}")
    assert (await look(two)).change.active.name == "mine"


async def test_roll_back_can_be_switched_off(two):
    await set_script(two, text_of(FAILING), max_failures=0)
    for number in range(25):
        with pytest.raises(ScriptError):
            await two.generate(f"r{number}")
    assert (await look(two)).change.active.name == "mine"


async def test_what_was_returned_to_is_not_rolled_back_further(two):
    await set_script(two, text_of(FAILING, "first"), max_failures=0)
    await set_script(two, text_of(FAILING, "second"))
    for number in range(9):
        with pytest.raises(ScriptError):
            await two.generate(f"r{number}")
    assert (await look(two)).change.active.name == "first"


@pytest.mark.parametrize("kind", ["death", "no room", "no such model", "client leaves", "another router's script"])
async def test_what_is_not_the_scripts_fault_does_not_count(two, kind):
    await set_script(two, to("b"))
    errors = {
        "death": ActorDied("planted"),
        "no room": OutOfBlocks(needed=2, free=1),
        "another router's script": ScriptError(file="/other.py", line=1, reason="planted", remedy=""),
    }
    two.engines["b"].error = errors.get(kind)
    for number in range(4):
        task = asyncio.ensure_future(two.generate(f"r{number}", model="x" if kind == "no such model" else "m"))
        if kind == "client leaves":
            await asyncio.sleep(0.001)
            task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() or task.exception() is not None
    report = await look(two)
    assert report.change.active.name == "to_b"
    assert [each.num_failures for each in report.versions] == [0] * len(report.versions)


async def test_a_role_that_no_engine_has_is_the_scripts_fault(two):
    body = """
async def route(request, fleet):
    async for token in least_loaded(fleet.with_role("prefil")).start_generate(request):
        yield token
"""
    for engine in two.engines.values():
        engine.registration.update(roles=("prefill", "decode"))
    await asyncio.sleep(1.0)
    await set_script(two, text_of(body))
    for number in range(3):
        with pytest.raises(NoEngine):
            await two.generate(f"r{number}", timeout=200.0)
    assert (await look(two)).change.what == "failed"


async def test_a_role_whose_only_engine_is_dead_is_not_the_scripts_fault(two):
    for name, engine in two.engines.items():
        engine.registration.update(roles=("prefill",) if name == "a" else ("decode",))
    await asyncio.sleep(1.0)
    await set_script(two, read_script("disaggregate", {}))
    await stop_actor(two.engines["a"])
    await asyncio.sleep(20.0)
    for number in range(3):
        with pytest.raises(NoEngine):
            await two.generate(f"r{number}", timeout=200.0)
    assert (await look(two)).change.active.name == "disaggregate"


async def test_a_role_whose_engines_are_yet_to_come_is_not_the_scripts_fault(fleet):
    await fleet.add_engine("p", "prefill")
    await fleet.add_router("least_loaded")
    await set_script(fleet, read_script("disaggregate", {}))
    asking = [asyncio.ensure_future(fleet.generate(f"r{number}")) for number in range(3)]
    await asyncio.sleep(2.0)
    await fleet.add_engine("d", "decode")
    assert await asyncio.gather(*asking) == [[100, 101, 102]] * 3
    report = await look(fleet)
    assert report.change.active.name == "disaggregate"
    assert [each.num_failures for each in report.versions] == [0] * len(report.versions)


async def test_a_script_that_waits_for_nothing_until_the_deadline_is_to_blame(two):
    await set_script(two, text_of("async def route(request, fleet):\n    await asyncio.sleep(1e6)\n    yield\n"))
    for number in range(3):
        with pytest.raises(AskTimeout):
            await two.generate(f"r{number}", timeout=200.0)
    report = await look(two)
    assert report.change.what == "failed"
    assert "await asyncio.sleep(1e6)" in report.history[-1].why


# ---- canary ------------------------------------------------------------------------------------------------------


async def test_a_canary_takes_its_share_of_the_requests_and_always_the_same_ones(two):
    await change(two, changer().try_script(to("b"), share=25.0))
    ids = [f"request-{number}" for number in range(400)]
    for request_id in ids:
        await two.generate(request_id, max_tokens=1)
    first = served(two)["b"]
    assert 70 <= len(first) <= 130
    for request_id in ids:
        await two.generate(request_id, max_tokens=1)
    assert served(two)["b"] == first + first


async def test_all_sequences_of_a_request_take_the_same_version(two):
    await change(two, changer().try_script(to("b"), share=50.0))
    for number in range(20):
        for name in (f"r{number}", f"r{number}.1", f"r{number}.2"):
            await two.generate(name, max_tokens=1)
    for ids in served(two).values():
        assert len(ids) % 3 == 0
    assert all(served(two).values())


async def test_a_canary_that_fails_is_ended_and_the_active_script_stays(two):
    await change(two, changer().try_script(text_of(FAILING), share=50.0))
    num_failed = 0
    for number in range(40):
        try:
            await two.generate(f"r{number}", max_tokens=1)
        except ScriptError:
            num_failed += 1
    assert num_failed == 3
    report = await look(two)
    assert (report.change.what, report.change.trial, report.change.active.name) == ("failed", None, "to_a")


async def test_a_promoted_canary_keeps_its_state(two):
    body = """
served = []

async def route(request, fleet):
    served.append(request.id)
    request.note(served=len(served))
    async for token in fleet.engines[len(served) > 2].start_generate(request):
        yield token
"""
    await change(two, changer().try_script(text_of(body), share=100.0))
    await two.generate("r1")
    await two.generate("r2")
    await change(two, changer().promote)
    await two.generate("r3")
    assert served(two) == {"a": ["r1", "r2"], "b": ["r3"]}
    report = await look(two)
    assert (report.change.what, report.change.trial) == ("promoted", None)


async def test_rolling_back_ends_a_canary_first_and_then_goes_to_the_script_before(two):
    await set_script(two, to("b"))
    await change(two, changer().try_script(to("a"), share=100.0))
    await change(two, changer().roll_back(None))
    report = await look(two)
    assert (report.change.active.name, report.change.trial) == ("to_b", None)
    await change(two, changer().roll_back(None))
    assert (await look(two)).change.active.name == "to_a"
    await change(two, changer().roll_back(None))
    assert (await look(two)).change.active.name == "least_loaded"
    with pytest.raises(RouteRefused, match="no earlier script"):
        await change(two, changer().roll_back(None))


async def test_a_version_is_returned_to_by_number_or_by_hash(two):
    await set_script(two, to("b"))
    numbers = {each.script.name: each for each in (await look(two)).versions}
    await change(two, changer().roll_back(str(numbers["to_a"].script.number)))
    assert (await look(two)).change.active.name == "to_a"
    await change(two, changer().roll_back(numbers["to_b"].version[:6]))
    assert (await look(two)).change.active.name == "to_b"
    for wrong in ("99", "ffff", "", "x" * 500):
        with pytest.raises(RouteRefused, match="no such version"):
            await change(two, changer().roll_back(wrong))
    with pytest.raises(RouteRefused, match="is the active one"):
        await change(two, changer().roll_back(numbers["to_b"].version))


# ---- what cannot be set ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("async def route(request fleet): pass", "syntax error"),
        ("1 / 0", "ZeroDivisionError"),
        ("raise SystemExit(1)", "SystemExit"),
        ("route = 3", "route is a int"),
        ("x = 1", "defines no route"),
        ("\0", "null bytes"),
    ],
)
async def test_a_script_that_does_not_load_changes_nothing(two, body, words):
    with pytest.raises(ScriptError, match=words) as refusal:
        await set_script(two, text_of(body))
    assert refusal.value.file == "/home/me/mine.py"
    assert (await look(two)).change.active.name == "to_a"
    assert (await look(two)).prepared == ""
    await set_script(two, to("b"))
    assert await two.generate("r") == [100, 101, 102]


async def test_nothing_is_set_over_a_bus_that_anybody_can_reach(two):
    two.nodes["control"].endpoint = "tcp://127.0.0.1:7000"
    with pytest.raises(RouteRefused, match="has no keys"):
        await set_script(two, to("b"))
