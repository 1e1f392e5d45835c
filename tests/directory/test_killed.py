"""A directory process that is killed and comes back, while a fleet of real processes serves: no request notices."""

import asyncio
from pathlib import Path

from real_fleet import RealFleet, real_fleet
from waiting import PATIENCE_S

from callboard.actors.engine.simulated import Simulation, simulated_tokens
from callboard.actors.protocol import Entry, Generate, ListEntries, SamplingParams, StartGenerate, Token
from callboard.bus import BusError, Ref
from callboard.kv.tokens import pack_tokens

LEASE_S = 3.0
"""What a Registration asks for."""
ALL = ["a", "b", "kv-a", "kv-b", "main"]
SIMULATION = Simulation(seconds_per_step=0.005)
NUM_TOKENS = 40


class Clients:
    """Ask for one sequence after another, each over the same refs; every one must come whole."""

    def __init__(self, refs: list[Ref]) -> None:
        self.num_served = dict.fromkeys(refs, 0)

    async def run(self, ref: Ref) -> None:
        while True:
            number = self.num_served[ref]
            prompt = [number % 900 + 1, 7, 9]
            sampling, request_id = (
                SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True),
                f"{ref.address.actor}-{number}",
            )
            message: Generate | StartGenerate
            if ref.address.actor == "main":
                message = Generate(request_id, "tiny", pack_tokens(prompt), sampling)
            else:
                message = StartGenerate(request_id, 0, pack_tokens(prompt), sampling)
            tokens: list[Token] = []
            async with ref.stream(message, timeout=30) as items:
                tokens.extend([token async for token in items])
            assert [token.id for token in tokens] == simulated_tokens(prompt, NUM_TOKENS)
            self.num_served[ref] += 1

    async def serve(self, num_more: int) -> None:
        """Wait until each has been served so many times more."""
        wanted = {ref: count + num_more for ref, count in self.num_served.items()}
        while any(self.num_served[ref] < count for ref, count in wanted.items()):
            await asyncio.sleep(0.02)


async def listed(fleet: RealFleet) -> dict[str, Entry]:
    """Return what the directory lists, nothing if it is not there."""
    directory = fleet.client.ref(fleet.address("directory", "directory"))
    try:
        return {entry.name: entry for entry in (await directory.ask(ListEntries(), timeout=1.0)).entries}
    except BusError:
        return {}


async def until_all_listed(fleet: RealFleet, seconds: float) -> None:
    async with asyncio.timeout(seconds):
        while sorted(await listed(fleet)) != ALL:
            await asyncio.sleep(0.02)


async def test_a_killed_directory_comes_back_and_nobody_has_missed_it(tmp_path: Path) -> None:
    async with real_fleet(tmp_path) as fleet:
        engines = [node for name in ("a", "b") for node in fleet.engine(name, SIMULATION, num_blocks=256)]
        await fleet.start(fleet.directory(), *engines, fleet.router())
        await until_all_listed(fleet, 20)
        # One by the router's choice, one over a ref to an engine, held from before.
        router = fleet.client.ref(fleet.address("control", "main"))
        engine = fleet.client.ref((await listed(fleet))["a"].address)
        clients = Clients([router, engine])
        async with asyncio.timeout(PATIENCE_S):
            async with asyncio.TaskGroup() as group:
                running = [group.create_task(clients.run(ref)) for ref in (router, engine)]
                await clients.serve(2)
                await fleet.kill("directory")
                await asyncio.sleep(LEASE_S)
                await clients.serve(2)
                await fleet.start(fleet.directory())
                await until_all_listed(fleet, LEASE_S)
                await clients.serve(2)
                for task in running:
                    task.cancel()
        # And what it lists is the same fleet: it serves whoever looks it up now.
        entries = await listed(fleet)
        assert entries["main"].pid == fleet.supervisor.states["control"].pid
        assert {entries[name].state for name in ("a", "b")} == {"ready"}
        for name in ("a", "b"):
            await fleet.assert_all_free(name)
            assert "crashed" not in fleet.log(name)
