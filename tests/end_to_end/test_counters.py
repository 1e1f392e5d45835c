"""What engines and KV managers say that they have done, against what was asked of them; the idle are silent."""

import asyncio
from collections import Counter
from random import Random
from typing import Any

import msgspec
import pytest
from fleet import Fleet, running_fleet

from callboard.actors.engine.simulated import SimulatedRunner, Simulation
from callboard.actors.protocol import Abort, Counters, Entry, Generate, ListEntries, SamplingParams, View
from callboard.bus import Address, BusError, VirtualClock
from callboard.bus.testing import run_virtual
from callboard.bus.transports.sim import SimHub
from callboard.kv.tokens import pack_tokens

LAYOUT = SimulatedRunner(Simulation()).layout
SETTLED_S = 1.0
"""Longer than two reports are apart."""


def fleet_of(seed: int, **options: Any) -> Any:
    return running_fleet(layout=LAYOUT, hub=SimHub(seed), clock=VirtualClock(), seed=seed, **options)


async def view(fleet: Fleet) -> View:
    directory = fleet.client.ref(fleet.nodes["control"].address_of("directory"))
    return await directory.ask(ListEntries())


async def ask_for(fleet: Fleet, message: Generate, seconds: float) -> None:
    async with fleet.router.stream(message, timeout=seconds) as tokens:
        async for _ in tokens:
            pass


async def entries(fleet: Fleet) -> dict[str, Entry]:
    await asyncio.sleep(SETTLED_S)
    return {entry.name: entry for entry in (await view(fleet)).entries}


@pytest.mark.parametrize("seed", range(5))
def test_counters_are_what_was_generated_computed_cached_and_evicted(seed: int) -> None:
    async def main() -> None:
        rng = Random(seed)
        heads = [[head, *range(40)] for head in range(3)]
        async with fleet_of(seed, engines=("a",), script="least_loaded", num_blocks=24) as fleet:
            work = [
                (rng.choice(heads) + [100 + i] * rng.randrange(1, 30), SamplingParams(rng.randrange(1, 60)))
                for i in range(25)
            ]
            answers = await asyncio.gather(*(fleet.generate(prompt, sampling) for prompt, sampling in work))
            found = await entries(fleet)
            engine, pool = found["a"].counters, found["kv-a"].counters
            usages = [answer.usage for answer in answers if answer.usage is not None]
            assert engine.num_prompt_tokens == sum(len(prompt) for prompt, _ in work)
            assert engine.num_generated_tokens == sum(len(answer.tokens) for answer in answers)
            assert engine.num_finished == Counter(answer.finish_reason for answer in answers)
            assert engine.num_preemptions == sum(usage.num_preemptions for usage in usages)
            assert engine.num_computed_tokens == sum(usage.num_computed_tokens for usage in usages)
            if not engine.num_preemptions:  # Who comes back asks for what it has generated, too.
                assert pool.num_queried_tokens == engine.num_prompt_tokens
                assert pool.num_hit_tokens == sum(usage.num_cached_tokens for usage in usages)
            assert pool.num_queried_tokens >= engine.num_prompt_tokens
            assert 0 < pool.num_hit_tokens < pool.num_queried_tokens
            stats = await fleet.stats("kv-a")
            assert pool.num_evicted_blocks == stats.num_evicted > 0
            assert found["kv-a"].load.cached_blocks == found["a"].load.cached_blocks == stats.cached

    run_virtual(main)


def test_a_pool_under_pressure_preempts_and_says_so() -> None:
    async def main() -> None:
        async with fleet_of(3, engines=("a",), script="least_loaded", num_blocks=10) as fleet:
            sampling = SamplingParams(60, ignore_eos=True)
            answers = await asyncio.gather(*(fleet.generate([i] * 30, sampling) for i in range(4)))
            counters = (await entries(fleet))["a"].counters
            assert counters.num_preemptions == sum(answer.usage.num_preemptions for answer in answers) > 0
            assert counters.num_prompt_tokens == 4 * 30
            assert counters.num_generated_tokens == 4 * 60

    run_virtual(main)


def test_how_a_sequence_ended_is_counted_once_and_by_its_name() -> None:
    costs = Simulation(seconds_per_step=0.05)

    async def main() -> None:
        async with fleet_of(1, engines=("a",), script="least_loaded", simulated=costs) as fleet:
            await fleet.generate([1, 2, 3], SamplingParams(3, ignore_eos=True))
            forever = SamplingParams(400, ignore_eos=True)
            message = Generate("left", "tiny", pack_tokens([5, 6]), forever)
            async with fleet.router.stream(message, timeout=60) as tokens:
                await anext(tokens)
            aborted = asyncio.ensure_future(fleet.generate([8, 9], forever, request_id="aborted"))
            await asyncio.sleep(1.0)
            engine = fleet.client.ref(fleet.nodes["a"].address_of("a"))
            await engine.ask(Abort("aborted"))
            await asyncio.wait((aborted,))
            late = asyncio.ensure_future(ask_for(fleet, Generate("late", "tiny", pack_tokens([4, 4]), forever), 0.7))
            await asyncio.wait((late,))
            assert isinstance(late.exception(), BusError)
            await asyncio.sleep(2.0)
            found = (await entries(fleet))["a"].counters
            assert found.num_finished["length"] == 1
            assert sum(found.num_finished.values()) == 4
            assert found.num_finished["abort"] >= 2
            assert found.num_prompt_tokens == 3 + 2 + 2 + 2

    run_virtual(main)


def test_counters_begin_with_an_actor_and_its_start_is_on_its_entry() -> None:
    async def main() -> None:
        async with fleet_of(1) as fleet:
            found = await entries(fleet)
            assert all(entry.counters == Counters() for entry in found.values())
            assert all(0.0 <= entry.started <= fleet.nodes["control"].clock.wall() for entry in found.values())

    run_virtual(main)


def test_a_manager_names_the_lanes_that_it_has_used() -> None:
    async def main() -> None:
        async with fleet_of(1) as fleet:
            assert (await entries(fleet))["kv-p"].detail == {}
            await fleet.generate(list(range(50)))
            found = await entries(fleet)
            assert found["kv-p"].detail == {"lanes": "kv-d: inproc"}
            assert found["kv-d"].detail == {}
            assert found["kv-p"].counters.num_bytes_sent == 50 * LAYOUT.token_bytes

    run_virtual(main)


def test_an_idle_fleet_tells_the_directory_nothing_new() -> None:
    async def main() -> None:
        async with fleet_of(2) as fleet:
            await asyncio.gather(*(fleet.generate(list(range(i, 60))) for i in range(5)))
            await entries(fleet)
            before = await view(fleet)
            await asyncio.sleep(60.0)
            assert await view(fleet) == before

    run_virtual(main)


def test_an_entry_without_the_newest_fields_is_still_one() -> None:
    entry = Entry("a", "engine", Address("n", "inproc://n", "a"))
    old = msgspec.msgpack.encode(msgspec.to_builtins(entry)[:-2])
    assert msgspec.msgpack.decode(old, type=Entry) == entry
