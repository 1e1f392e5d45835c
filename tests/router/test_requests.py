"""What the router does for every request: giving back, retries, admission, deadlines."""

import asyncio

import pytest

from callboard.actors.protocol import BadRequest, Generate, GetSubRequests, SamplingParams, SubRequest
from callboard.bus import AskTimeout, LinkLost
from callboard.kv.layout import CorruptPages, OutOfBlocks, StaleReservation
from callboard.kv.tokens import pack_tokens
from callboard.router import NoEngine, QueueFull, ScriptError
from callboard.router.spans import Spans

DISAGGREGATE = """
async def route(request: Request, fleet: Fleet):
    p, d = least_loaded(fleet.prefill), least_loaded(fleet.decode)
    kv = await d.prep_recv(request)
    await p.remote_send(request, kv)
    async for token in d.start_generate(request, begin=kv.end, kv=kv):
        yield token
"""


# ---- nothing is kept ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after_s", [0.0, 0.005, 0.099, 0.1, 0.1001, 0.105, 0.1101, 0.1115, 0.1125])
async def test_a_client_that_leaves_at_any_moment_leaves_nothing_behind(fleet, write_script, after_s):
    await fleet.add_two(write_script(DISAGGREGATE))
    fleet.managers["kv-decode"].reserve_s = 0.1

    async def client():
        await fleet.generate(max_tokens=100)

    task = asyncio.ensure_future(client())
    await asyncio.sleep(after_s)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await fleet.settle()
    assert fleet.is_clean()


@pytest.mark.parametrize("script", ["disaggregate", "unscoped"])
async def test_a_client_that_leaves_after_any_number_of_steps_leaves_nothing_behind(fleet, write_script, script):
    await fleet.add_two(write_script(DISAGGREGATE) if script == "unscoped" else script)
    for engine in fleet.engines.values():
        engine.token_s = 0.0
    for num_steps in range(120):
        task = asyncio.ensure_future(fleet.generate(f"r{num_steps}", max_tokens=4))
        for _ in range(num_steps):
            await asyncio.sleep(0)
        if num_steps % 2:
            await asyncio.sleep(0.01)  # Past the transfer.
            for _ in range(num_steps):
                await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        await fleet.settle()
        assert fleet.is_clean(), num_steps


async def test_an_engine_stops_generating_when_the_client_breaks_off(fleet):
    await fleet.add_two()
    async with fleet.stream(max_tokens=1000) as tokens:
        await anext(tokens)
        assert fleet.engines["decode"].num_open == 1
    await asyncio.sleep(0.01)
    assert fleet.is_clean()
    items = (await fleet.router.ref.ask(GetSubRequests("r"))).items
    assert items[-1].error == "cancelled"


async def test_a_reservation_that_no_engine_adopted_is_released_when_the_scope_ends(fleet, write_script):
    body = """
async def route(request: Request, fleet: Fleet):
    async with fleet.decode[0].prep_recv(request) as kv:
        pass
    async for token in fleet.prefill[0].start_generate(request):
        yield token
"""
    await fleet.add_two(write_script(body))
    await fleet.generate()
    assert [call[0] for call in fleet.managers["kv-decode"].calls] == ["prep_recv", "release"]
    assert fleet.is_clean()


async def test_an_adopted_reservation_is_not_released(fleet):
    await fleet.add_two()
    await fleet.generate()
    assert [call[0] for call in fleet.managers["kv-decode"].calls] == ["prep_recv"]


async def test_a_reservation_nobody_scoped_is_released_when_the_script_fails(fleet, write_script):
    body = """
async def route(request: Request, fleet: Fleet):
    kv = await fleet.decode[0].prep_recv(request)
    raise OSError("the script is wrong")
    yield
"""
    await fleet.add_two(write_script(body))
    with pytest.raises(ScriptError, match=r"script.py:7: route raised OSError: the script is wrong"):
        await fleet.generate()
    assert fleet.is_clean()


async def test_a_generation_left_half_way_ends_with_the_script(fleet, write_script):
    body = """
async def route(request: Request, fleet: Fleet):
    async for token in fleet.prefill[0].start_generate(request):
        break
    async for token in fleet.decode[0].start_generate(request):
        yield token
"""
    await fleet.add_two(write_script(body))
    assert await fleet.generate(max_tokens=5) == [100, 101, 102, 103, 104]
    await asyncio.sleep(0.01)
    assert fleet.is_clean()


# ---- retries -----------------------------------------------------------------------------------------------------


async def test_a_request_is_tried_again_elsewhere_when_its_engine_dies_before_the_first_token(fleet):
    for name in ("a", "b"):
        await fleet.add_engine(name)
    await fleet.add_router("least_loaded")
    fleet.engines["a"].token_s = fleet.engines["b"].token_s = 0.1
    async with fleet.stream() as tokens:
        await asyncio.sleep(0.05)
        first = next(name for name, engine in fleet.engines.items() if engine.calls)
        await fleet.kill(first)
        assert [token.id async for token in tokens] == [100, 101, 102]
    other = "b" if first == "a" else "a"
    assert fleet.engines[other].calls == [("start_generate", "r", 1, None, None)]
    items = (await fleet.router.ref.ask(GetSubRequests("r"))).items
    assert [(i.actor, i.error.split(":")[0]) for i in items] == [(first, "ActorDied"), (other, "")]
    assert fleet.is_clean()


@pytest.mark.parametrize(
    "error",
    [
        LinkLost("the peer is gone"),
        StaleReservation(reservation_id="r", reason="this KV manager has been restarted since"),
        CorruptPages(reservation_id="r", num_pages=1, layer=0, block=0),
    ],
    ids=["dies", "meets a restarted receiver", "delivers broken pages"],
)
async def test_a_request_whose_sender_fails_is_sent_by_another(fleet, error):
    await fleet.add_two()
    await fleet.add_engine("prefill2", "prefill")
    fleet.managers["kv-prefill"].error = error
    assert await fleet.generate() == [100, 101, 102]
    assert [call[0] for call in fleet.managers["kv-decode"].calls] == ["prep_recv", "release", "prep_recv"]
    assert fleet.managers["kv-prefill2"].calls == [("remote_send", "r", "prefill2", 0, 40)]
    assert fleet.is_clean()


async def test_three_attempts_are_enough(fleet):
    for name in ("a", "b", "c", "d"):
        engine = await fleet.add_engine(name)
        engine.error = LinkLost("cut")
    await fleet.add_router("least_loaded")
    with pytest.raises(LinkLost):
        await fleet.generate()
    assert sum(len(engine.calls) for engine in fleet.engines.values()) == 3


async def test_a_retry_waits_for_the_only_engine_to_come_back(fleet):
    engine = await fleet.add_engine("a")
    await fleet.add_router("least_loaded")
    engine.error = LinkLost("cut")

    async def heal():
        await asyncio.sleep(0.5)
        engine.error = None

    results = await asyncio.gather(fleet.generate(), heal())
    assert results[0] == [100, 101, 102]


# ---- no engine, no room ------------------------------------------------------------------------------------------


async def test_a_role_that_nobody_has_is_named(fleet):
    await fleet.add_engine("prefill", "prefill")
    await fleet.add_router("disaggregate")
    with pytest.raises(
        NoEngine, match=r"model 'm' with role 'decode' \(known: prefill \(ready, model m, roles prefill"
    ):
        await fleet.generate()


async def test_an_engine_that_just_failed_is_not_called_ready(fleet):
    await fleet.add_two(patience_s=0.1)
    fleet.engines["decode"].error = LinkLost("cut")
    with pytest.raises(NoEngine, match=r"known: decode \(failed just now, .*; prefill \(ready,"):
        await fleet.generate()


@pytest.mark.parametrize("script", ["round_robin", "least_loaded", "disaggregate", "balanced"])
async def test_a_model_that_nobody_serves_is_named(fleet, script):
    await fleet.add_engine("a")
    await fleet.add_router(script)
    with pytest.raises(NoEngine, match="no ready engine serves model 'other'"):
        await fleet.generate(model="other")


async def test_a_fleet_that_is_starting_is_waited_for_and_a_model_nobody_serves_later_is_not(fleet):
    await fleet.add_router("least_loaded")

    async def start_engine():
        await asyncio.sleep(2.0)
        await fleet.add_engine("a")

    results = await asyncio.gather(fleet.generate(), start_engine())
    assert results[0] == [100, 101, 102]
    await asyncio.sleep(20.0)
    loop = asyncio.get_running_loop()
    begin = loop.time()
    with pytest.raises(NoEngine):
        await fleet.generate(model="other")
    assert loop.time() == begin


async def test_an_engine_without_roles_takes_both_parts(fleet):
    await fleet.add_engine("a")
    await fleet.add_router("disaggregate")
    assert await fleet.generate() == [100, 101, 102]


async def test_a_request_waits_for_an_engine_that_is_starting(fleet):
    engine = await fleet.add_engine("a")
    engine.registration.update(state="starting")
    await fleet.add_router("least_loaded")
    await fleet.router.view.wait_for(lambda view: any(e.state == "starting" for e in view.entries))

    async def get_ready():
        await asyncio.sleep(2.0)
        engine.registration.update(state="ready")

    results = await asyncio.gather(fleet.generate(), get_ready())
    assert results[0] == [100, 101, 102]


async def test_a_draining_engine_gets_no_new_requests(fleet):
    for name in ("a", "b"):
        await fleet.add_engine(name)
    await fleet.add_router("round_robin")
    fleet.engines["a"].registration.update(state="draining")
    await fleet.router.view.wait_for(lambda view: any(e.state == "draining" for e in view.entries))
    for number in range(3):
        await fleet.generate(f"r{number}")
    assert fleet.engines["a"].calls == []


async def test_a_full_pool_is_an_answer_to_the_client(fleet):
    await fleet.add_two()
    fleet.managers["kv-decode"].error = OutOfBlocks(needed=8, free=3)
    with pytest.raises(OutOfBlocks, match="8 blocks are needed and 3 are free"):
        await fleet.generate()
    assert fleet.is_clean()


async def test_a_refusal_of_an_engine_reaches_the_client_as_itself(fleet):
    engine = await fleet.add_engine("a")
    await fleet.add_router("least_loaded")
    engine.error = BadRequest(reason="the prompt is too long")
    with pytest.raises(BadRequest, match="the prompt is too long"):
        await fleet.generate()


async def test_admission_is_bounded(fleet):
    engine = await fleet.add_engine("a")
    await fleet.add_router("least_loaded", max_queue=2)
    engine.token_s = 1.0
    async with fleet.stream("r1") as first, fleet.stream("r2") as second:
        await anext(first)
        await anext(second)
        with pytest.raises(QueueFull, match="2 requests are in flight and the router takes at most 2"):
            await fleet.generate("r3")
    await asyncio.sleep(0.1)
    assert await fleet.generate("r4") == [100, 101, 102]


async def test_who_has_the_last_token_has_the_place_too(fleet, write_script):
    body = """
async def route(request, fleet):
    async for token in fleet.engines[0].start_generate(request):
        yield token
    await asyncio.sleep(5.0)
"""
    await fleet.add_engine("a")
    await fleet.add_router(write_script(body), max_queue=1)
    for number in range(3):
        async with fleet.stream(f"r{number}") as tokens:
            while (await anext(tokens)).finish_reason is None:
                pass
            async with fleet.stream(f"at-once-{number}") as others:
                assert (await anext(others)).position == 0
    await asyncio.sleep(10.0)
    assert fleet.is_clean()


async def test_a_request_ends_at_its_deadline(fleet):
    engine = await fleet.add_engine("a")
    await fleet.add_router("least_loaded", deadline_s=5.0)
    engine.token_s = 2.0
    loop = asyncio.get_running_loop()
    begin = loop.time()
    with pytest.raises(AskTimeout):
        await fleet.generate(max_tokens=10, timeout=60.0)
    assert loop.time() - begin == pytest.approx(5.0, abs=0.1)
    await asyncio.sleep(0.1)
    assert fleet.is_clean()


async def test_a_deadline_holds_against_a_script_that_hangs(fleet, write_script):
    body = """
async def route(request: Request, fleet: Fleet):
    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.Event().wait())
    yield
"""
    await fleet.add_engine("a")
    await fleet.add_router(write_script(body), deadline_s=5.0)
    with pytest.raises(AskTimeout):
        await fleet.generate(timeout=60.0)
    assert fleet.is_clean()


async def test_the_deadline_of_a_request_that_nobody_reads_frees_all_it_held(fleet):
    await fleet.add_engine("a")
    await fleet.add_router("least_loaded", deadline_s=5.0)
    sampling = SamplingParams(max_tokens=2000)
    message = Generate("r", "m", pack_tokens(range(4)), sampling)
    async with fleet.router.ref.stream(message, timeout=60.0, credit=4) as tokens:
        await anext(tokens)
        await asyncio.sleep(5.1)
        assert fleet.is_clean()
        with pytest.raises(AskTimeout, match="request r passed its deadline"):
            async for _ in tokens:
                pass


async def test_managers_are_told_how_long_they_may_wait(fleet):
    await fleet.add_two(deadline_s=12.0)
    await fleet.generate(timeout=60.0)
    assert fleet.managers["kv-decode"].wait_s == pytest.approx(12.0, abs=0.1)
    await fleet.generate("again", timeout=7.0)
    assert fleet.managers["kv-decode"].wait_s == pytest.approx(7.0, abs=0.1)


async def test_requests_are_routed_on_the_last_view_while_the_directory_is_away(fleet):
    await fleet.add_engine("a")
    await fleet.add_router("least_loaded")
    fleet.nodes["control"].remove("directory")
    await asyncio.sleep(30.0)
    assert fleet.router.view.is_stale
    assert await fleet.generate() == [100, 101, 102]


def test_the_record_is_bounded():
    spans = Spans(num_requests=3)
    for number in range(10):
        spans.add(SubRequest(f"r{number}", "prep_recv", "a", 0.0, 1.0))
    assert len(spans) == 3
    assert [s.request_id for s in spans.of_last(20)] == ["r7", "r8", "r9"]


async def test_what_a_task_that_was_left_behind_reserves_is_given_back(fleet, write_script):
    body = """
async def route(request: Request, fleet: Fleet):
    asyncio.get_running_loop().left_behind = asyncio.ensure_future(reserve(fleet.engines[0], request))
    async for token in least_loaded(fleet.engines).start_generate(request):
        yield token

async def reserve(engine, request):
    await engine.prep_recv(request)
"""
    await fleet.add_two(write_script(body))
    for manager in fleet.managers.values():
        manager.reserve_s = 0.5
    assert await fleet.generate() == [100, 101, 102]
    await fleet.settle()
    assert fleet.is_clean()


async def test_a_request_without_a_prompt_is_refused_before_a_script_is_blamed_for_it(fleet):
    await fleet.add_two("adaptive")
    with pytest.raises(BadRequest, match="the prompt is empty"):
        await fleet.generate(prompt=0)
    assert fleet.is_clean()
