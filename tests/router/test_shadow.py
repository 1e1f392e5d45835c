"""A script in the shadow: it decides for real requests, nothing of it is sent, and no request feels it."""

import asyncio

import pytest
from swapping import LINE_OF_BODY, change, changer, look, served, text_of, to

from callboard.bus import ActorDied
from callboard.router.script import read_script

SPLIT = """
async def route(request, fleet, *, ratio: float = 0.2):
    split = request.num_tokens - round(ratio * request.num_tokens)
    p, d = least_loaded(fleet.prefill), least_loaded(fleet.decode)
    async with d.prep_recv(request, end=split) as kv:
        await p.remote_send(request, kv, begin=kv.begin, end=kv.end)
        async for token in d.start_generate(request, begin=kv.end, kv=kv):
            yield token
"""


async def shadow(fleet, text):
    await change(fleet, changer().try_script(text, share=None))


def calls(fleet):
    everybody = [*fleet.engines.values(), *fleet.managers.values()]
    return sorted(str(call) for each in everybody for call in each.calls)


@pytest.mark.parametrize("script", ["least_loaded", "round_robin", "disaggregate", "balanced", "prefix_aware"])
async def test_a_shadow_of_the_same_script_agrees_on_everything(fleet, script):
    await fleet.add_two(script)
    for manager in fleet.managers.values():
        manager.num_cached = 7
    await shadow(fleet, read_script(script))
    for number in range(10):
        await asyncio.gather(*(fleet.generate(f"r{number}-{each}") for each in range(4)))
    report = (await look(fleet)).shadow
    assert (report.num_compared, report.num_agreed, report.num_failed, report.num_skipped) == (40, 40, 0, 0)


async def test_nothing_of_a_shadow_is_sent(fleet):
    await fleet.add_two("disaggregate")
    await fleet.generate("r")
    alone = calls(fleet)
    for each in (*fleet.engines.values(), *fleet.managers.values()):
        each.calls.clear()
        each.num_made = 0
    body = """
async def route(request, fleet):
    await fleet.probe(request)
    d = fleet.decode[0]
    kv = await d.prep_recv(request)
    await fleet.prefill[0].remote_send(request, kv)
    await d.abort(request)
    async for token in d.start_generate(request, kv=kv):
        yield token
"""
    await shadow(fleet, text_of(body))
    await fleet.generate("r")
    await fleet.settle()
    assert calls(fleet) == alone
    assert (await look(fleet)).shadow.num_compared == 1
    assert fleet.is_clean()


async def test_what_is_decided_otherwise_is_shown(fleet):
    await fleet.add_two("balanced")
    fleet.managers["kv-decode"].num_cached = 5
    await shadow(fleet, text_of(SPLIT, ratio=0.5))
    await fleet.generate("r")
    report = (await look(fleet)).shadow
    assert (report.num_compared, report.num_agreed) == (1, 0)
    assert report.differing[0].active == (
        "prep_recv      decode [0, 32)",
        "remote_send    prefill [5, 32)",
        "start_generate decode [32, 40)",
    )
    assert report.differing[0].shadow == (
        "prep_recv      decode [0, 20)",
        "remote_send    prefill [5, 20)",
        "start_generate decode [20, 40)",
    )


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("async def route(request, fleet):\n    raise KeyError('x')\n    yield\n", "KeyError: 'x'"),
        ("async def route(request, fleet):\n    raise SystemExit(1)\n    yield\n", "SystemExit: 1"),
        ("async def route(request, fleet):\n    raise KeyboardInterrupt\n    yield\n", "KeyboardInterrupt"),
        ("async def route(request, fleet):\n    await asyncio.sleep(1e9)\n    yield\n", "asyncio.sleep(1e9)"),
        ("async def route(request, fleet):\n    fleet.engines[9]\n    yield\n", "tuple index out of range"),
    ],
)
async def test_a_shadow_that_fails_is_counted_and_no_request_fails(fleet, body, words):
    await fleet.add_two()
    await shadow(fleet, text_of(body))
    for number in range(5):
        assert await fleet.generate(f"r{number}") == [100, 101, 102]
    await asyncio.sleep(40.0)
    report = await look(fleet)
    assert report.shadow.num_failed == 5
    assert report.shadow.last_error.startswith(f"/home/me/mine.py:{LINE_OF_BODY + 1} in route: ")
    assert words in report.shadow.last_error
    assert report.change.what == "shadow"
    assert fleet.is_clean()


async def test_only_some_shadows_run_at_once(fleet):
    await fleet.add_two()
    await shadow(fleet, text_of("async def route(request, fleet):\n    await asyncio.sleep(20.0)\n    yield\n"))
    await asyncio.gather(*(fleet.generate(f"r{number}") for number in range(30)))
    assert (await look(fleet)).shadow.num_skipped == 22


async def test_a_shadow_that_holds_up_the_loop_is_the_last(fleet):
    body = """
from callboard.bus.testing import VirtualLoop

async def route(request, fleet):
    asyncio.get_running_loop().now += 0.3
    async for token in fleet.engines[0].start_generate(request):
        yield token
"""
    await fleet.add_two()
    await shadow(fleet, text_of(body))
    for number in range(5):
        await fleet.generate(f"r{number}")
    report = (await look(fleet)).shadow
    assert report.num_skipped == 4
    assert "held up all requests" in report.last_error


async def test_shadows_take_a_small_share_of_the_time(fleet):
    body = """
async def route(request, fleet):
    asyncio.get_running_loop().now += 0.1
    async for token in fleet.engines[0].start_generate(request):
        yield token
"""
    await fleet.add_two()
    await shadow(fleet, text_of(body))
    for number in range(100):
        await fleet.generate(f"r{number}")
        await asyncio.sleep(0.1)
    report = (await look(fleet)).shadow
    assert 5 <= 100 - report.num_skipped <= 15


async def test_requests_that_did_not_end_well_are_not_compared(fleet):
    await fleet.add_engine("a")
    await fleet.add_router("least_loaded")
    await shadow(fleet, read_script("least_loaded"))
    fleet.engines["a"].error = ActorDied("planted")
    with pytest.raises(ActorDied):
        await fleet.generate("r")
    report = (await look(fleet)).shadow
    assert (report.num_compared, report.num_unlike) == (0, 1)


async def test_a_shadow_is_promoted_and_its_background_work_begins_only_then(fleet):
    body = """
rounds = []

@background(every=1.0)
async def work(fleet: Fleet):
    rounds.append(len(fleet.engines))
""" + to("a").source.split("\n\n", 1)[1]
    await fleet.add_engine("a")
    await fleet.add_router("least_loaded")
    await shadow(fleet, text_of(body))
    await asyncio.sleep(5.0)
    trial = (await look(fleet)).versions[-1]
    assert trial.background == ()
    await change(fleet, changer().promote)
    await asyncio.sleep(5.5)
    assert [each.num_runs for each in (await look(fleet)).versions[-1].background] == [6]
    assert (await look(fleet)).shadow is None
    await fleet.generate("r")
    assert served(fleet) == {"a": ["r"]}
