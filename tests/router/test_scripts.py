"""The shipped strategies, by the exact sub-requests they make."""

import asyncio

import pytest

from callboard.actors.protocol import GetSubRequests
from callboard.router import NoEngine, ScriptError


async def one_prefill_one_decode(fleet, script, **config):
    await fleet.add_engine("prefill", "prefill")
    await fleet.add_engine("decode", "decode")
    await fleet.add_router(script, **config)
    return fleet.managers["kv-prefill"], fleet.managers["kv-decode"], fleet.engines["decode"]


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 40])
async def test_disaggregate_sends_the_whole_prompt(fleet, length):
    p, d, decode = await one_prefill_one_decode(fleet, "disaggregate")
    assert await fleet.generate(prompt=length) == [100, 101, 102]
    assert d.calls == [("prep_recv", "r", 0, length)]
    assert p.calls == [("remote_send", "r", "prefill", 0, length)]
    assert decode.calls == [("start_generate", "r", 0, length, "r1")]
    assert fleet.is_clean()


async def test_disaggregate_sends_only_what_the_receiver_lacks(fleet):
    p, d, _ = await one_prefill_one_decode(fleet, "disaggregate")
    d.num_cached = 16
    await fleet.generate(prompt=40)
    assert p.calls == [("remote_send", "r", "prefill", 16, 40)]


async def test_disaggregate_asks_nothing_of_the_sender_when_all_is_cached(fleet):
    p, d, decode = await one_prefill_one_decode(fleet, "disaggregate")
    d.num_cached = 40
    assert await fleet.generate(prompt=40) == [100, 101, 102]
    assert p.calls == []
    assert len(decode.calls) == 1


async def test_disaggregate_works_between_engines_of_one_manager(fleet):
    await fleet.add_engine("prefill", "prefill")
    await fleet.add_engine("decode", "decode", manager="kv-prefill")
    await fleet.add_router("disaggregate")
    assert await fleet.generate() == [100, 101, 102]
    calls = [call[0] for call in fleet.managers["kv-prefill"].calls]
    assert calls == ["prep_recv", "remote_send"]
    assert fleet.is_clean()


@pytest.mark.parametrize(
    ("length", "ratio", "split"),
    [(40, 0.2, 32), (40, 0.0, 39), (40, 1.0, 0), (40, 0.33, 27), (1, 0.2, 0), (2, 0.2, 1), (17, 0.5, 9), (3, 1.0, 0)],
)
async def test_balanced_splits_the_prompt(fleet, length, ratio, split):
    p, d, decode = await one_prefill_one_decode(fleet, "balanced", options={"ratio": ratio})
    assert await fleet.generate(prompt=length) == [100, 101, 102]
    assert d.calls[0] == ("prep_recv", "r", 0, split)
    assert p.calls == ([("remote_send", "r", "prefill", 0, split)] if split else [])
    assert decode.calls == [("start_generate", "r", 0, split, "r1")]
    assert fleet.is_clean()


async def test_balanced_takes_a_hit_past_its_split(fleet):
    p, d, decode = await one_prefill_one_decode(fleet, "balanced")
    d.num_cached = 36
    assert await fleet.generate(prompt=40) == [100, 101, 102]
    assert p.calls == []
    assert decode.calls == [("start_generate", "r", 0, 32, "r1")]


async def test_round_robin_takes_the_engines_in_turn(fleet):
    for name in ("a", "b", "c"):
        await fleet.add_engine(name)
    await fleet.add_router("round_robin")
    for number in range(6):
        await fleet.generate(f"r{number}")
    served = {name: [call[1] for call in engine.calls] for name, engine in fleet.engines.items()}
    assert served == {"a": ["r0", "r3"], "b": ["r1", "r4"], "c": ["r2", "r5"]}


async def test_requests_of_one_instant_go_to_different_engines(fleet):
    for name in ("a", "b", "c"):
        await fleet.add_engine(name)
    await fleet.add_router("least_loaded")
    await asyncio.gather(*(fleet.generate(f"r{number}") for number in range(6)))
    assert [len(engine.calls) for engine in fleet.engines.values()] == [2, 2, 2]
    assert fleet.is_clean()


async def test_prefill_engines_share_the_prompts_of_one_instant(fleet):
    for name in ("p0", "p1"):
        await fleet.add_engine(name, "prefill")
    for name in ("d0", "d1", "d2"):
        await fleet.add_engine(name, "decode")
    await fleet.add_router("disaggregate")
    await asyncio.gather(*(fleet.generate(f"r{number}") for number in range(6)))
    assert [len(fleet.managers[f"kv-p{n}"].calls) for n in range(2)] == [3, 3]
    assert [len(fleet.engines[f"d{n}"].calls) for n in range(3)] == [2, 2, 2]


async def test_every_sub_request_is_recorded_with_what_it_did(fleet):
    await one_prefill_one_decode(fleet, "disaggregate")
    await fleet.generate("r", prompt=40)
    items = (await fleet.router.ref.ask(GetSubRequests("r"))).items
    assert [(i.verb, i.actor, i.error) for i in items] == [
        ("prep_recv", "decode", ""),
        ("remote_send", "prefill", ""),
        ("start_generate", "decode", ""),
    ]
    send, generate = items[1], items[2]
    assert (send.num_bytes, send.lane, send.num_computed_tokens) == (40 * 128, "inproc", 40)
    assert (generate.num_computed_tokens, generate.num_reused_tokens) == (1, 3)
    assert all(i.end_s >= i.start_s for i in items)


async def test_the_record_holds_all_sequences_of_a_request(fleet):
    await fleet.add_engine("a")
    await fleet.add_router("round_robin")
    for request_id in ("r", "r.1", "other"):
        await fleet.generate(request_id)
    ask = fleet.router.ref.ask
    assert [i.request_id for i in (await ask(GetSubRequests("r"))).items] == ["r", "r.1"]
    assert [i.request_id for i in (await ask(GetSubRequests("r.1"))).items] == ["r.1"]
    assert [i.request_id for i in (await ask(GetSubRequests(limit=1))).items] == ["other"]
    assert [i.request_id for i in (await ask(GetSubRequests())).items] == ["r", "r.1", "other"]


async def test_the_record_is_complete_when_the_last_token_is_there(fleet):
    await fleet.add_engine("a")
    await fleet.add_router("round_robin")
    async with fleet.stream() as tokens:
        async for token in tokens:
            if token.finish_reason is not None:
                items = (await fleet.router.ref.ask(GetSubRequests("r"))).items
                assert [i.verb for i in items] == ["start_generate"]
                break
        else:
            pytest.fail("there was no last token")


async def test_what_was_computed_for_a_request_elsewhere_is_not_called_cached(fleet):
    _, d, _ = await one_prefill_one_decode(fleet, "disaggregate")
    usages = []
    for num_cached in (0, 2):
        d.num_cached = num_cached
        async with fleet.stream(prompt=2) as tokens:
            usages += [token.usage async for token in tokens if token.usage is not None]
    # The noting engine reports 3 cached and 1 computed; of them 2 came from the prefill engine, the first time.
    assert [(usage.num_cached_tokens, usage.num_computed_tokens) for usage in usages] == [(1, 3), (3, 1)]


async def test_a_script_that_exits_ends_its_request_and_not_the_fleet(fleet, write_script):
    await fleet.add_engine("a")
    await fleet.add_router(write_script("import sys\nasync def route(request, fleet):\n    sys.exit(3)\n    yield\n"))
    with pytest.raises(ScriptError, match=r"script\.py:6: route raised SystemExit: 3"):
        await fleet.generate()
    assert fleet.is_clean()


async def test_chain_has_each_engine_compute_its_range_behind_what_it_was_sent(fleet):
    for name in ("a", "b", "c"):
        await fleet.add_engine(name)
    await fleet.add_router("chain", options={"min_range": 100})
    assert await fleet.generate(prompt=350) == [100, 101, 102]
    assert fleet.managers["kv-a"].calls == [("remote_send", "r", "a", 0, 116)]
    assert fleet.managers["kv-b"].calls == [
        ("prep_recv", "r", 0, 116),
        ("release", "r1"),
        ("remote_send", "r", "b", 0, 233),
    ]
    assert fleet.managers["kv-c"].calls == [("prep_recv", "r", 0, 233)]
    assert fleet.engines["c"].calls == [("start_generate", "r", 0, 233, "r1")]
    assert fleet.is_clean()


async def test_chain_leaves_a_short_prompt_to_one_engine(fleet):
    for name in ("a", "b"):
        await fleet.add_engine(name)
    await fleet.add_router("chain", options={"min_range": 100})
    for number, length in enumerate((1, 99, 199)):
        await fleet.generate(f"r{number}", prompt=length)
    calls = [call for manager in fleet.managers.values() for call in manager.calls]
    assert not [call for call in calls if call[0] == "remote_send"]
    assert fleet.is_clean()


@pytest.mark.parametrize("script", ["prefix_aware", "migrate"])
async def test_a_cached_prefix_draws_requests_until_its_engine_is_busy(fleet, script):
    for name in ("a", "b"):
        await fleet.add_engine(name)
        fleet.engines[name].token_s = 1.0
    await fleet.add_router(script)
    fleet.managers["kv-b"].num_cached = 4000
    await fleet.generate("first", prompt=4096, max_tokens=1)  # The router knows of none such, and asks nobody.
    assert not any(manager.calls for manager in fleet.managers.values())
    for engine in fleet.engines.values():
        engine.calls.clear()
    await asyncio.gather(*(fleet.generate(f"r{n}", prompt=4096, max_tokens=2) for n in range(6)))
    assert [len(engine.calls) for engine in fleet.engines.values()] == [0, 6]
    # 96 tokens of each have to be computed there, all of 4096 elsewhere: it takes many for that to be sooner.
    await asyncio.gather(*(fleet.generate(f"s{n}", prompt=4096, max_tokens=2) for n in range(100)))
    others, holder = (len(engine.calls) for engine in fleet.engines.values())
    assert 0 < others < 20 < holder
    assert fleet.is_clean()


@pytest.mark.parametrize("script", ["prefix_aware", "migrate", "adaptive", "chain", "least_loaded", "disaggregate"])
async def test_a_script_without_an_engine_is_told_which_is_missing(fleet, script):
    await fleet.add_router(script, patience_s=0.0)
    with pytest.raises(NoEngine):
        await fleet.generate()
    assert fleet.is_clean()
