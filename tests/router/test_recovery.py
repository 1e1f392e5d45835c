"""Attempts after the first token: a request goes on where it was, whatever died under it."""

import asyncio

import pytest

from callboard.actors.protocol import Generate, SamplingParams
from callboard.bus import ActorDied, LinkLost
from callboard.kv.layout import OutOfBlocks
from callboard.kv.tokens import pack_tokens
from callboard.router import ScriptError

FULL = OutOfBlocks(needed=5, free=1, cached=0)


async def two(fleet, script="least_loaded", **config):
    for name in ("a", "b"):
        await fleet.add_engine(name)
    await fleet.add_router(script, **config)


async def test_a_request_goes_on_elsewhere_behind_the_tokens_that_were_sent(fleet):
    await two(fleet)
    for engine in fleet.engines.values():
        engine.token_s = 0.1
    async with fleet.stream(max_tokens=6) as tokens:
        seen = [await anext(tokens), await anext(tokens)]
        first = next(name for name, engine in fleet.engines.items() if engine.calls)
        await fleet.kill(first)
        seen += [token async for token in tokens]
    assert [(token.position, token.id) for token in seen] == [(n, 100 + n) for n in range(6)]
    assert seen[-1].finish_reason == "length"
    assert fleet.is_clean()


@pytest.mark.parametrize("fails_at", [1, 2, 4])
async def test_any_death_between_two_tokens_costs_none_and_repeats_none(fleet, fails_at):
    await two(fleet)
    for engine in fleet.engines.values():
        engine.error, engine.fails_at = LinkLost("cut"), fails_at
    # Both fail where they are asked for that position first; from then on they are well.

    async def heal():
        while not any(engine.calls for engine in fleet.engines.values()):
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)
        for engine in fleet.engines.values():
            engine.error = None

    tokens, _ = await asyncio.gather(fleet.generate(max_tokens=5), heal())
    assert tokens == [100, 101, 102, 103, 104]
    assert fleet.is_clean()


async def test_deaths_after_progress_are_not_counted_against_a_request(fleet):
    await two(fleet)
    for number in range(8):
        name = f"e{number}"
        engine = await fleet.add_engine(name)
        engine.error, engine.fails_at = ActorDied("gone"), number
    for name in ("a", "b"):
        fleet.engines[name].error, fleet.engines[name].fails_at = ActorDied("gone"), 9
    engine = await fleet.add_engine("last")
    await asyncio.sleep(0.5)
    assert await fleet.generate(max_tokens=10) == list(range(100, 110))
    assert fleet.is_clean()


async def test_an_engine_that_fails_at_one_token_again_and_again_ends_the_request(fleet):
    for name in ("a", "b", "c", "d"):
        engine = await fleet.add_engine(name)
        engine.error, engine.fails_at = ActorDied("gone"), 2
    await fleet.add_router("least_loaded")
    with pytest.raises(ActorDied):
        await fleet.generate(max_tokens=5)
    assert sum(len(engine.calls) for engine in fleet.engines.values()) == 3
    assert fleet.is_clean()


async def test_who_has_begun_waits_for_the_only_engine_to_come_back(fleet):
    engine = await fleet.add_engine("a")
    await fleet.add_router("least_loaded")
    engine.error, engine.fails_at = LinkLost("cut"), 2

    async def heal():
        await asyncio.sleep(0.5)
        engine.error = None

    tokens, _ = await asyncio.gather(fleet.generate(max_tokens=4), heal())
    assert tokens == [100, 101, 102, 103]


async def test_full_pools_do_not_end_who_has_begun_and_are_an_answer_to_who_has_not(fleet):
    await two(fleet)
    for engine in fleet.engines.values():
        engine.error, engine.fails_at = FULL, 0
    with pytest.raises(OutOfBlocks):
        await fleet.generate()
    for engine in fleet.engines.values():
        engine.fails_at = 2

    async def heal():
        await asyncio.sleep(1.0)
        for engine in fleet.engines.values():
            engine.error = None

    tokens, _ = await asyncio.gather(fleet.generate(max_tokens=4), heal())
    assert tokens == [100, 101, 102, 103]
    assert fleet.is_clean()


async def test_the_script_sees_what_was_sent_as_a_longer_prompt_of_a_later_attempt(fleet, write_script):
    script = write_script(
        """
async def route(request: Request, fleet: Fleet):
    assert len(request.prompt) == request.num_tokens == 10 + request.num_output_tokens
    assert request.num_output_tokens == 2 * request.attempt
    async for token in least_loaded(fleet.engines).start_generate(request):
        yield token
"""
    )
    await two(fleet, script)
    for engine in fleet.engines.values():
        engine.token_s = 0.1
    async with fleet.stream(max_tokens=4, prompt=10) as tokens:
        await anext(tokens), await anext(tokens)
        await fleet.kill(next(name for name, engine in fleet.engines.items() if engine.calls))
        async for _ in tokens:
            pass
    notes = [note for engine in fleet.engines.values() for note in engine.prompts]
    assert notes == [(list(range(10)), 0), ([*range(10), 100, 101], 2)]


async def test_a_script_that_repeats_what_was_sent_is_told_so(fleet, write_script):
    script = write_script(
        """
async def route(request: Request, fleet: Fleet):
    async for token in least_loaded(fleet.engines).start_generate(request):
        yield token if not request.attempt else Token(0, 1)
"""
    )
    await two(fleet, script)
    fleet.engines["a"].error, fleet.engines["a"].fails_at = LinkLost("cut"), 2
    with pytest.raises(ScriptError, match="route yielded position 0 where 2 was due"):
        await fleet.generate(max_tokens=5)
    assert fleet.is_clean()


async def test_what_another_router_sent_is_gone_on_from(fleet):
    await two(fleet)
    message = Generate(
        "r", "m", pack_tokens([1, 2, 3, 100, 101]), SamplingParams(max_tokens=4), num_output_tokens=2, attempt=65536
    )
    async with fleet.router.ref.stream(message, timeout=5.0) as tokens:
        assert [(token.position, token.id) async for token in tokens] == [(2, 102), (3, 103)]
    (call,) = (call for engine in fleet.engines.values() for call in engine.calls)
    assert call[2] == 65536


async def test_a_death_after_the_last_token_is_nobodys_business(fleet, write_script):
    script = write_script(
        """
async def route(request: Request, fleet: Fleet):
    async for token in least_loaded(fleet.engines).start_generate(request):
        yield token
    raise LinkLost("of something that the script asked for in the end")
"""
    )
    await two(fleet, script)
    assert await fleet.generate() == [100, 101, 102]
    assert sum(len(engine.calls) for engine in fleet.engines.values()) == 1
    assert fleet.is_clean()


@pytest.mark.parametrize("error", ["OutOfBlocks(needed=2, free=1)", "NoEngine(model='m', role='x', known='')"])
async def test_neither_is_a_full_pool_or_a_lack_of_engines(fleet, write_script, error):
    script = write_script(
        f"""
async def route(request: Request, fleet: Fleet):
    async for token in least_loaded(fleet.engines).start_generate(request):
        yield token
    raise {error}
"""
    )
    await two(fleet, script)
    assert await fleet.generate() == [100, 101, 102]
    assert sum(len(engine.calls) for engine in fleet.engines.values()) == 1
    assert fleet.is_clean()


@pytest.mark.parametrize("ends_at", [0, 1, 3])
async def test_a_stream_that_ends_without_its_last_token_goes_on_as_after_a_death(fleet, ends_at):
    await two(fleet)
    fleet.engines["a"].ends_at = ends_at
    assert await fleet.generate(max_tokens=5) == [100, 101, 102, 103, 104]
    assert [len(engine.calls) for engine in fleet.engines.values()] == [1, 1]
    assert sum(each.num_failures for each in fleet.router.routes.report().versions) == 0
    assert fleet.is_clean()


async def test_an_abort_names_the_attempt_that_asks_for_it(fleet, write_script):
    body = """
async def route(request: Request, fleet: Fleet):
    async for token in fleet.engines[0].start_generate(request):
        yield token
    await fleet.engines[0].abort(request)
"""
    engine = await fleet.add_engine("a")
    await fleet.add_router(write_script(body))
    await fleet.generate("r", attempt=3)
    assert engine.calls[-1] == ("abort", "r", 3)
