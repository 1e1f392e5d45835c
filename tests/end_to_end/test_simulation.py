"""The production actors on the virtual clock: a run is a function of its seed."""

import asyncio

import msgspec
import pytest
from fleet import running_fleet

from callboard.actors.engine.simulated import SimulatedRunner, Simulation, simulated_tokens
from callboard.actors.protocol import SamplingParams
from callboard.bus import VirtualClock
from callboard.bus.testing import run_virtual
from callboard.bus.transports.sim import SimHub

SIMULATED = SimulatedRunner(Simulation()).layout


async def story(seed: int, script: str) -> tuple[list[str], list[list[int]]]:
    """Serve some requests at once; return the log of all messages of all nodes, and the tokens."""
    log: list[str] = []
    encode = msgspec.msgpack.Encoder().encode
    async with running_fleet(
        layout=SIMULATED, script=script, hub=SimHub(seed), clock=VirtualClock(), seed=seed, num_blocks=64
    ) as fleet:
        for node in fleet.nodes.values():
            node.follow(lambda row, _, name=node.name: log.append(f"{name} {encode(row)!r}"), everything=True)
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(
                    fleet.generate([7 + i, *range(40 + 5 * i)], SamplingParams(max_tokens=9, ignore_eos=True))
                )
                for i in range(5)
            ]
        await fleet.assert_nothing_leaks()
        return log, [task.result().tokens for task in tasks]


@pytest.mark.parametrize("script", ["round_robin", "disaggregate", "balanced"])
def test_the_same_seed_gives_the_same_log_and_the_right_tokens(script: str) -> None:
    first, second = (run_virtual(lambda: story(11, script)) for _ in range(2))
    assert first == second
    assert len(first[0]) > 50
    expected = [simulated_tokens([7 + i, *range(40 + 5 * i)], 9) for i in range(5)]
    assert first[1] == expected
    assert run_virtual(lambda: story(12, script))[0] != first[0]


def test_pages_of_finished_layers_arrive_while_the_others_are_computed() -> None:
    costs = Simulation(seconds_per_prefill_token=0.01)
    arrived: dict[int, float] = {}

    async def main() -> None:
        clock = VirtualClock()
        async with running_fleet(layout=SIMULATED, hub=SimHub(1), clock=clock, seed=1, simulated=costs) as fleet:
            store = fleet.actors["kv-d"].store
            fresh = bytes(store.page(0, 0, 0))
            answer = asyncio.ensure_future(fleet.generate(list(range(100)), SamplingParams(max_tokens=1)))
            began = clock.now()
            while not answer.done():
                for layer in range(SIMULATED.num_layers):
                    if layer not in arrived and store.page(layer, 1, 0) != fresh:
                        arrived[layer] = clock.now() - began
                await clock.sleep(0.005)

    run_virtual(main)
    assert [arrived[layer] for layer in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0], abs=0.1)
