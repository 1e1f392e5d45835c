"""The arithmetic of adaptive scripts: what is predicted is what engines of known costs take."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest
from fleet import Fleet, running_fleet

from callboard.actors.engine.simulated import SimulatedRunner, Simulation
from callboard.actors.protocol import Generate, SamplingParams, Sent, StartGenerate
from callboard.bus import Address, VirtualClock
from callboard.kv.tokens import pack_tokens
from callboard.router import Prediction, Request, best_plan, predict
from callboard.router.attempt import Attempt
from callboard.router.fleet import Fleet as Seen
from callboard.router.known.lengths import Lengths
from callboard.router.known.transfers import Transfer, Transfers
from callboard.router.pace import Parts, pooled

COSTS = Simulation(seconds_per_step=0.004, seconds_per_prefill_token=0.0002, seconds_per_decode=0.001)
LAYOUT = SimulatedRunner(COSTS).layout
RANDOM = Random(7)


def tokens_of(length: int) -> list[int]:
    return [RANDOM.randrange(1000) for _ in range(length)]


def sampling(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True)


@asynccontextmanager
async def measured(*engines: str, **options: Any) -> AsyncIterator[Fleet]:
    """Give a fleet whose engines have made enough steps for their costs to be known."""
    async with running_fleet(
        layout=LAYOUT, engines=engines, script="least_loaded", clock=VirtualClock(), simulated=COSTS, **options
    ) as fleet:
        for length in (300, 200, 150, 100, 260, 90):
            await asyncio.gather(*(fleet.generate(tokens_of(length), sampling(9)) for _ in range(2 * len(engines))))
        await asyncio.sleep(30)  # No engine remembers prefill.
        yield fleet


def seen_by(fleet: Fleet, prompt: list[int], max_tokens: int) -> tuple[Request, Seen]:
    """Return a request and the fleet, as a script of the router would see both now."""
    router: Any = fleet.actors["main"]
    message = Generate("asked", "tiny", pack_tokens(prompt), sampling(max_tokens))
    request = Request(message, attempt=0, remaining_s=lambda: 100.0)
    return request, Seen(Attempt(router._shared, request, 0.0), router.view)


async def taken(fleet: Fleet, prompt: list[int], max_tokens: int) -> Prediction:
    clock, at = fleet.client.clock, []
    begin = clock.now()
    message = Generate("real", "tiny", pack_tokens(prompt), sampling(max_tokens))
    async with fleet.router.stream(message) as tokens:
        async for _ in tokens:
            at.append(clock.now() - begin)
    return Prediction(at[0], at[-1], 0.0)


@pytest.mark.parametrize(("length", "max_tokens"), [(40, 30), (500, 5), (1500, 40)])
async def test_an_idle_engine_takes_what_is_predicted(length, max_tokens):
    async with measured("e") as fleet:
        prompt = tokens_of(length)
        request, seen = seen_by(fleet, prompt, max_tokens)
        (engine,) = seen.engines
        predicted, real = predict(request, engine, engine), await taken(fleet, prompt, max_tokens)
        assert predicted.ttft == pytest.approx(real.ttft, rel=0.1, abs=0.005)
        assert predicted.jct == pytest.approx(real.jct, rel=0.1, abs=0.005)
        assert predicted.delay == 0.0


async def test_what_waits_and_what_decodes_is_in_the_prediction():
    async with measured("e") as fleet:
        others = [asyncio.ensure_future(fleet.generate(tokens_of(600), sampling(200))) for _ in range(3)]
        await asyncio.sleep(0.01)
        prompt = tokens_of(400)
        request, seen = seen_by(fleet, prompt, 10)
        (engine,) = seen.engines
        predicted, real = predict(request, engine, engine), await taken(fleet, prompt, 10)
        assert predicted.ttft == pytest.approx(real.ttft, rel=0.1)
        assert predicted.jct == pytest.approx(real.jct, rel=0.1)
        assert predicted.delay == pytest.approx(3 * (400 * 0.0002 + 10 * 0.001 / 2), rel=0.1)
        await asyncio.gather(*others)


async def test_a_split_prompt_takes_what_is_predicted():
    async with measured("p", "d") as fleet:
        await fleet.generate(tokens_of(300), sampling(9))
        prompt = tokens_of(1000)
        request, seen = seen_by(fleet, prompt, 10)
        p, d = seen.prefill[0], seen.decode[0]
        whole, split = predict(request, p, d, 1000), predict(request, p, d, 500)
        # Nothing overlaps in one request: what P does not compute, D computes after it.
        assert split.jct == pytest.approx(whole.jct, rel=0.05)
        assert whole.ttft == pytest.approx(1000 * 0.0002 + 3 * 0.004, rel=0.2)


async def test_what_is_cached_is_not_computed():
    async with measured("e0", "e1") as fleet:
        request, seen = seen_by(fleet, tokens_of(1000), 10)
        a, b = seen.engines
        assert predict(request, a, a, cached={a: 960}).ttft < predict(request, b, b, cached={a: 960}).ttft / 4
        migrated = predict(request, a, b, 960, {a: 960})
        assert migrated.ttft < predict(request, b, b, cached={a: 960}).ttft / 2


async def test_the_plan_leaves_the_decodes_of_one_engine_alone():
    async with measured("e0", "e1") as fleet:
        answer = asyncio.ensure_future(fleet.generate(tokens_of(50), sampling(100)))
        await asyncio.sleep(0.1)
        request, seen = seen_by(fleet, tokens_of(1000), 10)
        (busy,) = (engine for engine in seen.engines if engine.load.num_decoding)
        plan = best_plan(request, seen.engines, seen.engines, {})
        assert plan.split == 0
        assert plan.decode != busy
        await answer


async def test_who_took_the_prompts_before_still_gets_decodes():
    costs = Simulation(seconds_per_step=0.004, seconds_per_prefill_token=2e-5, seconds_per_decode=5e-4)
    async with running_fleet(
        layout=LAYOUT, engines=("e0", "e1"), script="adaptive", clock=VirtualClock(), simulated=costs
    ) as fleet:
        for _ in range(8):
            await asyncio.gather(*(fleet.generate(tokens_of(100), sampling(9)) for _ in range(4)))
        # As after a time of one prefill and one decode engine: the first has been busy with prompts alone.
        first = fleet.client.ref(fleet.actors["e0"].node.address_of("e0"))
        for number in range(40):
            message = StartGenerate(f"before-{number}", 0, pack_tokens(tokens_of(1000)), sampling(1))
            async with first.stream(message) as tokens:
                assert len([token async for token in tokens]) == 1
        answers = [asyncio.ensure_future(fleet.generate(tokens_of(100), sampling(40))) for _ in range(6)]
        await asyncio.sleep(0.1)
        _, seen = seen_by(fleet, tokens_of(10), 1)
        loads = [engine.load.num_running + engine.load.num_waiting for engine in seen.engines]
        await asyncio.gather(*answers)
    assert loads == [3, 3]


async def test_noise_in_the_parts_of_a_fit_does_not_tell_equal_engines_apart():
    even, odd = Parts(4e-3, 4e-5, 4e-4, 3e-8), Parts(3.5e-3, 5e-5, 6e-4, 1e-8)
    slow = even.times(1.6)
    assert max(even.typical_s(400) / odd.typical_s(400), odd.typical_s(400) / even.typical_s(400)) < 1.2
    assert len({*pooled([even, odd], 400)}) == 1
    by_itself, other = pooled([even, slow], 400)
    assert other.typical_s(400) == pytest.approx(1.6 * by_itself.typical_s(400), rel=0.01)


async def test_a_plan_of_one_engine_is_that_engine_and_of_none_is_an_error():
    async with measured("e") as fleet:
        request, seen = seen_by(fleet, tokens_of(100), 10)
        plan = best_plan(request, seen.prefill, seen.decode, {})
        assert (plan.prefill.name, plan.decode.name, plan.split) == ("e", "e", 0)
        with pytest.raises(ValueError, match="empty"):
            best_plan(request, (), (), {})


def test_answers_are_expected_to_be_as_long_as_they_were():
    lengths = Lengths()
    assert lengths.expected("m", most=500, is_exact=False) == 500
    for _ in range(200):
        lengths.ended("m", 40)
    assert lengths.expected("m", most=500, is_exact=False) == 40
    assert lengths.expected("m", most=10, is_exact=False) == 10
    assert lengths.expected("m", most=500, is_exact=True) == 500
    assert lengths.expected("m", most=0, is_exact=True) == 1


def test_what_hand_offs_took_is_what_the_next_will_take():
    transfers, a, b, c = Transfers(), *(Address(name, f"inproc://{name}", name) for name in "abc")
    for _ in range(100):
        transfers.sent(a, b, Sent(0, "shm", 500, 0, 0.5, 1.0, 0.0, 0.0), seconds=1.51, num_tokens=500)
        transfers.sent(a, b, Sent(0, "shm", 0, 1000, 0.0, 0.0, 0.0, 0.0), seconds=0.11, num_tokens=1000)
        transfers.sent(a, c, Sent(0, "ucx", 500, 0, 0.5, 1.0, 0.0, 0.0), seconds=1.6, num_tokens=500)
    near, far = transfers.between(a, b), transfers.between(a, c)
    assert near.handoff_s == pytest.approx(0.01, rel=0.01)
    assert near.token_s == pytest.approx(0.0001, rel=0.01)
    assert far.handoff_s == pytest.approx(0.1, rel=0.01)
    assert transfers.copy().between(a, b) == near
    assert Transfers().between(a, b) == Transfer()
