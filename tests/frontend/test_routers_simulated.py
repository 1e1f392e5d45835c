"""Routers that die, hang and are cut off while a frontend asks them, in simulation: every client gets its tokens, once.

What is asked, and what it should bring, is drawn from the seed (tests/chaos/frontend_client.py): text, stop strings,
token ids, several choices and usage, streamed or not, from clients that are slow or leave.
"""

import asyncio
import os
from random import Random

import pytest
from chaos.frontend_client import Answered, FrontendClient
from fleet import Fleet, running_fleet

from callboard.actors.actor import Actor, start_actor
from callboard.actors.engine.simulated import SimulatedRunner, Simulation
from callboard.actors.frontend.routers import RouterCounts, Routers
from callboard.actors.registration import DirectoryView
from callboard.bus import Node, VirtualClock
from callboard.bus.testing import SimulatedProcess, run_virtual
from callboard.bus.transports.sim import Break, SimHub
from callboard.router.actor import RouterActor

NUM_REQUESTS = 25
NUM_SEEDS = int(os.environ.get("ROUTER_SEEDS", "6"))
DIRECTORY = "inproc://control"


class Process:
    """A router in a process of its own, which comes back when it was killed."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        self.fleet = fleet
        self.name = name
        self.num_starts = 0
        self.process: SimulatedProcess
        self.start()

    def start(self) -> None:
        self.num_starts += 1
        self.process = SimulatedProcess(f"{self.name}#{self.num_starts}")
        self.task = self.process.spawn(self._serve())

    async def _serve(self) -> None:
        fleet = self.fleet
        endpoint, transport = f"inproc://{self.name}", fleet.hub.transport()
        seed = fleet.seed * 1000 + self.num_starts
        async with Node(
            self.name, endpoint=endpoint, transport=transport, fleet="test", clock=VirtualClock(), seed=seed
        ) as node:
            router = RouterActor(RouterActor.Config(name=self.name, script="disaggregate"))
            await start_actor(node, self.name, router, directory=node.ref(fleet.actors["directory"].ref.address))
            await asyncio.get_running_loop().create_future()

    async def suffer(self, rng: Random, hub: SimHub) -> None:
        """Let one thing happen to it."""
        match rng.choice(["kill", "kill", "pause", "cut"]):
            case "kill":
                self.process.kill()
                await asyncio.sleep(rng.uniform(0.0, 0.6))
                self.start()
            case "pause":
                self.process.pause()
                await asyncio.sleep(rng.choice([0.05, 0.5, 7.0]))  # The last is longer than silence is borne.
                self.process.resume()
            case "cut":
                for end in hub.connections("inproc://control", f"inproc://{self.name}"):
                    hub.break_connection(end, Break(keep_out=rng.random(), keep_in=rng.random(), near_s=0.0, far_s=0.0))


def run(seed: int) -> tuple[list[Answered], list[RouterCounts]]:
    """Serve requests drawn from a seed while things happen to two of three routers."""
    rng = Random(seed)
    simulation = Simulation(num_layers=2, vocab_size=1000, eos_token_id=rng.choice([None, 7]), seconds_per_step=0.02)
    layout = SimulatedRunner(simulation).layout
    hub = SimHub(seed)

    async def main() -> tuple[list[Answered], list[RouterCounts]]:
        async with running_fleet(
            layout=layout, hub=hub, clock=VirtualClock(), seed=seed, simulated=simulation, num_blocks=256
        ) as fleet:
            node, watcher = fleet.nodes["control"], Actor()
            await start_actor(node, "watcher", watcher, directory=node.ref(fleet.actors["directory"].ref.address))
            routers = Routers(node, DirectoryView(watcher))
            processes = [Process(fleet, name) for name in ("r1", "r2")]
            while len(routers.there()) < 3:
                await asyncio.sleep(0.05)
            client = FrontendClient(node, routers, simulation, max_model_len=64 * 16)

            async def suffer(process: Process) -> None:
                while True:
                    await asyncio.sleep(rng.uniform(0.05, 1.0))
                    await process.suffer(rng, hub)

            suffering = [asyncio.ensure_future(suffer(process)) for process in processes]
            requests = []
            for number in range(NUM_REQUESTS):
                requests.append(asyncio.ensure_future(client.request(rng, f"q{number}")))
                await asyncio.sleep(rng.uniform(0.0, 0.3))
            answers = await asyncio.gather(*requests)
            for each in suffering:
                each.cancel()
            for process in processes:
                process.process.resume()
            await asyncio.sleep(30)
            assert [counts.num_in_flight for counts in routers.counts.values()] == [0] * len(routers.counts)
            await fleet.assert_nothing_leaks()
            assert [len(fleet.actors[name].scheduler) for name in ("p", "d")] == [0, 0]
            counts = list(routers.counts.values())
            for process in processes:
                process.process.kill()
            return list(answers), counts

    return run_virtual(main)


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_every_client_gets_its_tokens_whatever_happens_to_routers(seed: int) -> None:
    answers, counts = run(seed)
    assert [(each.request_id, each.problems) for each in answers if each.problems] == []
    assert {each.state for each in answers} <= {"finished", "left"}, [each.error for each in answers if each.error]
    assert sum(each.state == "finished" for each in answers) >= NUM_REQUESTS // 2
    assert sum(each.num_lost for each in counts) > 0
