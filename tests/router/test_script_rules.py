"""What a script sees, the rules it may break, and what a client is told when it does."""

import asyncio

import pytest

from callboard.actors.protocol import ListEntries
from callboard.bus import TapRecord
from callboard.bus.taps import decode_facts
from callboard.kv.layout import OutOfBlocks
from callboard.router import ScriptError

# ---- scripts that break the rules --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("    if False:\n        yield\n", "route yielded nothing"),
        ("    yield 7\n", "route yielded a int and not a Token"),
        ("    yield None\n", "route yielded a NoneType and not a Token"),
        ("    yield Token(3, 1)\n", "route yielded position 3 where 0 was due"),
        ("    yield Token(0, 1)\n", "ended after 1 tokens, none of which was the last"),
        ("    yield Token(0, 1)\n    yield Token(0, 1)\n", "route yielded position 0 where 1 was due"),
        (
            "    yield Token(0, 1, None, 'stop')\n    yield Token(1, 1)\n",
            "route yielded a token after the last one",
        ),
        ("    yield Token(0, 1)\n    {}['x']\n", "script.py:6: route raised KeyError"),
        (
            "    task = asyncio.ensure_future(asyncio.sleep(9.0))\n    task.cancel()\n    await task\n    yield\n",
            "script.py:7: route waited for a task that was cancelled",
        ),
    ],
)
async def test_a_script_that_breaks_a_rule_is_told_so_and_the_fleet_lives_on(fleet, write_script, body, words):
    await fleet.add_engine("a")
    await fleet.add_router(write_script("async def route(request, fleet):\n" + body))
    with pytest.raises(ScriptError) as refusal:
        await fleet.generate()
    assert words in str(refusal.value)
    with pytest.raises(ScriptError):
        await fleet.generate("again")
    assert fleet.is_clean()


async def test_a_failure_among_parallel_calls_is_the_failure(fleet, write_script):
    body = """
async def route(request: Request, fleet: Fleet):
    async with asyncio.TaskGroup() as group:
        for engine in fleet.engines:
            group.create_task(reserve(engine, request))
    yield

async def reserve(engine, request):
    async with engine.prep_recv(request) as kv:
        await asyncio.sleep(10)
"""
    await fleet.add_two(write_script(body))
    fleet.managers["kv-prefill"].error = OutOfBlocks(needed=8, free=3)
    with pytest.raises(OutOfBlocks):
        await fleet.generate()
    await fleet.settle()
    assert fleet.is_clean()


RANGES = """
async def route(request: Request, fleet: Fleet):
    p, d = fleet.prefill[0], fleet.decode[0]
    async with d.prep_recv(request, end={end}) as kv:
        await p.remote_send(request, kv, begin={begin}, end={send_end})
        async for token in d.start_generate(request, begin={start}, kv=kv):
            yield token
"""


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ({"end": 41}, "[0, 41) is no range of a prompt of 40 tokens: 41 lies outside"),
        ({"end": -41}, "-41 lies outside"),
        ({"end": 20.5}, "bounds are integers"),
        ({"begin": 30, "send_end": 20}, "[30, 20) is no range of a prompt of 40 tokens: it ends before it begins"),
        ({"end": 20, "send_end": 30}, "the reservation ends at 20"),
        ({"start": 41}, "41 lies outside"),
    ],
)
async def test_an_invalid_range_is_refused_with_a_sentence(fleet, write_script, ranges, words):
    bounds = {"end": None, "begin": None, "send_end": None, "start": None} | ranges
    await fleet.add_two(write_script(RANGES.format(**bounds)))
    with pytest.raises(ScriptError, match=r"script\.py:\d+: ") as refusal:
        await fleet.generate()
    assert words in str(refusal.value)
    assert fleet.is_clean()


async def test_bounds_may_count_from_the_end(fleet, write_script):
    bounds = {"end": -1, "begin": -30, "send_end": -2, "start": -1}
    await fleet.add_two(write_script(RANGES.format(**bounds)))
    await fleet.generate()
    assert fleet.managers["kv-decode"].calls == [("prep_recv", "r", 0, 39)]
    assert fleet.managers["kv-prefill"].calls == [("remote_send", "r", "prefill", 10, 38)]
    assert fleet.engines["decode"].calls == [("start_generate", "r", 0, 39, "r1")]


async def test_what_the_receiver_has_is_not_sent_again(fleet, write_script):
    bounds = {"end": None, "begin": 0, "send_end": None, "start": None}
    await fleet.add_two(write_script(RANGES.format(**bounds)))
    fleet.managers["kv-decode"].num_cached = 16
    await fleet.generate()
    assert fleet.managers["kv-prefill"].calls == [("remote_send", "r", "prefill", 16, 40)]


# ---- what scripts see --------------------------------------------------------------------------------------------


async def test_a_script_sees_the_request_and_the_fleet(fleet, write_script):
    body = """
async def route(request: Request, fleet: Fleet):
    cached = await fleet.probe(request)
    engine = best_match(fleet.engines, cached)
    request.note(engine=engine.name, cached=cached[engine], first=request.prompt[:2], headers=request.headers)
    assert [e.name for e in fleet.idlest(2)] and 0 < request.deadline <= 120 and request.num_tokens == 40
    assert [e.name for e in fleet.with_role("prefill")] == ["prefill"] == [e.name for e in fleet.prefill]
    assert engine.load.num_waiting == 1
    async for token in engine.start_generate(request):
        yield token
"""
    await fleet.add_two(write_script(body))
    fleet.managers["kv-decode"].num_cached = 16
    await fleet.generate(headers={"x": "y"})
    why = {"engine": "decode", "cached": "16", "first": "[0, 1]", "headers": "{'x': 'y'}"}
    records = [TapRecord(*row) for row in fleet.router.node.trace.of("r")]
    [facts] = [decode_facts(record.facts) for record in records if record.name == "attempt"]
    assert {name: facts[f"why.{name}"] for name in why} == why


async def test_a_router_is_in_the_directory_with_its_script(fleet):
    await fleet.add_router("balanced")
    await asyncio.sleep(0.1)
    (entry,) = (await fleet.directory.ask(ListEntries())).entries
    assert (entry.name, entry.kind, entry.detail["script"]) == ("main", "router", "balanced")
    assert entry.detail["version"] == fleet.router.script.version
