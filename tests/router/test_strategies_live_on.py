"""Every strategy on one engine, after an engine's death in the midst of an answer, and where prefixes get hot."""

import asyncio
import random
from typing import Any

import pytest
from fleet import Fleet, running_fleet

from callboard.actors.engine.simulated import SimulatedRunner, Simulation, simulated_tokens
from callboard.actors.protocol import SamplingParams
from callboard.bus import VirtualClock
from callboard.router.actor import RouterActor
from callboard.router.script import shipped_scripts

COSTS = Simulation(seconds_per_step=0.004, seconds_per_prefill_token=0.0002, seconds_per_decode=0.001)
LAYOUT = SimulatedRunner(COSTS).layout
OPTIONS: dict[str, dict[str, Any]] = {"chain": {"min_range": 16}}
SAMPLING = SamplingParams(max_tokens=30, ignore_eos=True)


def fleet_of(*engines: str, script: str, **given: Any) -> Any:
    options = OPTIONS.get(script, {})
    return running_fleet(
        layout=LAYOUT, engines=engines, script=script, options=options, clock=VirtualClock(), simulated=COSTS, **given
    )


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(1000) for _ in range(rng.randrange(1, 200))] for _ in range(count)]


def is_clean(fleet: Fleet) -> bool:
    router: Any = fleet.actors["main"]
    return not router.num_in_flight and not any(router.loads.num_own(name) for name in fleet.actors)


@pytest.mark.parametrize("script", shipped_scripts())
async def test_one_engine_is_enough(script):
    async with fleet_of("e", script=script) as fleet:
        work = prompts(6)
        results = await asyncio.gather(*(fleet.generate(prompt, SAMPLING) for prompt in work))
        assert [result.tokens for result in results] == [simulated_tokens(prompt, 30) for prompt in work]
        await fleet.assert_nothing_leaks()
        assert is_clean(fleet)


@pytest.mark.parametrize("script", shipped_scripts())
async def test_answers_go_on_where_they_were_when_an_engine_dies(script):
    engines = ("p0", "p1", "d0", "d1") if script in ("disaggregate", "balanced") else ("e0", "e1", "e2")
    async with fleet_of(*engines, script=script) as fleet:
        work = prompts(9)
        tasks = [asyncio.ensure_future(fleet.generate(prompt, SAMPLING)) for prompt in work]
        await asyncio.sleep(0.12)
        assert not any(task.done() for task in tasks)
        await fleet.nodes[engines[-1]].stop()
        results = await asyncio.gather(*tasks)
        assert [result.tokens for result in results] == [simulated_tokens(prompt, 30) for prompt in work]
        await asyncio.sleep(3.0)
        assert is_clean(fleet)


async def test_a_hot_prefix_is_copied_before_it_is_asked_for_elsewhere():
    rng = random.Random(9)
    shared = [rng.randrange(1000) for _ in range(320)]
    async with fleet_of("e0", "e1", "e2", script="migrate") as fleet:
        for number in range(30):
            await fleet.generate([*shared, number], SamplingParams(max_tokens=1))
        assert (await fleet.generate([*shared, 99], SAMPLING, request_id="before")).usage.num_cached_tokens == 320
        await asyncio.sleep(3.0)
        together = (fleet.generate([*shared, 100 + n], SAMPLING) for n in range(9))
        usages = [result.usage for result in await asyncio.gather(*together)]
        assert [usage.num_cached_tokens for usage in usages if usage] == [320] * 9
        served = {name: fleet.actors[name].scheduler.counts.num_generated_tokens for name in ("e0", "e1", "e2")}
        assert min(served.values()) >= 60, served
        await fleet.assert_nothing_leaks()
        assert is_clean(fleet)


async def test_an_idle_engine_looks_idle_at_once_and_other_routers_requests_are_seen():
    async with fleet_of("e0", script="least_loaded") as fleet:
        other = RouterActor(RouterActor.Config(name="other", script="least_loaded"))
        node = await fleet.node("elsewhere")
        await fleet.start(node, "other", other, node.ref(fleet.actors["directory"].ref.address))
        await other.view.wait_for(lambda view: any(each.name == "e0" for each in view.entries))
        await asyncio.sleep(0.1)
        main: Any = fleet.actors["main"]

        def seen(router: Any) -> int:
            (entry,) = router.view.entries("engine")
            load = router.loads.load(entry)
            return int(load.num_running + load.num_waiting)

        task = asyncio.ensure_future(fleet.generate(list(range(100)), SAMPLING))
        await asyncio.sleep(0.03)
        assert (seen(main), seen(other)) == (1, 1)
        await task
        assert (seen(main), seen(other)) == (0, 0)
        await asyncio.sleep(0.001)
        assert (seen(main), seen(other)) == (0, 0)


async def test_a_router_goes_on_with_the_directory_when_an_engine_tells_nothing_any_more():
    async with fleet_of("e0", script="least_loaded") as fleet:
        router: Any = fleet.actors["main"]
        await asyncio.sleep(0.1)
        assert router.loads._reported
        await fleet.nodes["e0"].stop()
        await asyncio.sleep(0.1)
        assert not router.loads._reported
