"""A directory that is cut off from everybody, on the virtual clock: the fleet goes on without it, and heals with it."""

import asyncio

import pytest
from fleet import Fleet, running_fleet

from callboard.actors.engine.simulated import SimulatedRunner, Simulation, simulated_tokens
from callboard.actors.protocol import ListEntries, SamplingParams
from callboard.bus import LinkLost, VirtualClock
from callboard.bus.testing import run_virtual
from callboard.bus.transports.sim import SimHub
from callboard.router.actor import RouterActor

LEASE_S = 3.0
ALL = ["a", "b", "kv-a", "kv-b", "main"]


async def serve_until(stop: asyncio.Event, fleet: Fleet) -> int:
    """Send requests one after another, each by the router's choice; return how many. All must end well."""
    num_served = 0
    while not stop.is_set():
        prompt = [num_served % 900 + 1, 7, 9]
        result = await fleet.generate(prompt, SamplingParams(max_tokens=8, ignore_eos=True))
        assert result.tokens == simulated_tokens(prompt, 8)
        num_served += 1
        await asyncio.sleep(0.2)
    return num_served


async def watch_for(seconds: float, router: RouterActor) -> None:
    """Look all the time whether the router knows both engines."""
    for _ in range(round(seconds / 0.001)):
        assert [entry.name for entry in router.view.entries("engine")] == ["a", "b"]
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("refuses", [False, True])
@pytest.mark.parametrize("cut_s", [0.5 * LEASE_S, 1.5 * LEASE_S, 10 * LEASE_S])
def test_a_directory_that_is_cut_off_past_the_leases_costs_no_request(cut_s: float, refuses: bool) -> None:
    async def story() -> None:
        hub = SimHub(1)
        async with running_fleet(
            layout=SimulatedRunner(Simulation()).layout,
            hub=hub,
            clock=VirtualClock(),
            engines=("a", "b"),
            script="round_robin",
            has_own_directory=True,
            simulated=Simulation(seconds_per_step=0.01),
        ) as fleet:
            router = fleet.actors["main"]
            assert isinstance(router, RouterActor)
            directory = fleet.client.ref(fleet.actors["directory"].ref.address)

            async def listed() -> list[str]:
                return [entry.name for entry in (await directory.ask(ListEntries())).entries]

            while await listed() != ALL or not router.view.has_view:
                await asyncio.sleep(0.1)
            stop = asyncio.Event()
            serving = [asyncio.ensure_future(serve_until(stop, fleet)) for _ in range(2)]
            await asyncio.sleep(1.0)
            island = hub.partition(frozenset([fleet.nodes["directory"].endpoint]), refuses=refuses)
            await asyncio.sleep(cut_s)
            assert router.view.is_stale == (cut_s > LEASE_S)
            hub.heal(island)
            watching = asyncio.ensure_future(watch_for(2.0, router))
            # The client's own link may have broken: it is dialled anew.
            async with asyncio.timeout(LEASE_S):
                while True:
                    try:
                        if await listed() == ALL:
                            break
                    except LinkLost:
                        pass
                    await asyncio.sleep(0.05)
            await watching
            await asyncio.sleep(5.0)
            assert not router.view.is_stale
            assert [entry.name for entry in router.view.entries()] == ALL
            stop.set()
            num_served = await asyncio.gather(*serving)
            assert min(num_served) > cut_s + 5.0
            await fleet.assert_nothing_leaks()

    run_virtual(story)
