"""Random fleets under random load and faults, on the virtual clock: right tokens, nothing lost, nothing hung.

A failing seed is the bug report: ``pytest tests/end_to_end/test_chaos.py -k 'SEED'`` replays it. More of them:
``CHAOS_SEEDS=1000:1500 make test ARGS=tests/end_to_end/test_chaos.py``.
"""

import asyncio
import os
from pathlib import Path
from random import Random
from typing import Any

import pytest
from fleet import Fleet, running_fleet

from callboard.actors.actor import start_actor, stop_actor
from callboard.actors.engine.engine import Engine
from callboard.actors.engine.simulated import SimulatedRunner, Simulation, simulated_tokens
from callboard.actors.protocol import BadRequest, SamplingParams
from callboard.bus import BusError, NotUnderstood, RemoteError, VirtualClock
from callboard.bus.testing import run_virtual
from callboard.bus.transports.sim import SimHub
from callboard.router import ScriptError

LAYOUT = SimulatedRunner(Simulation()).layout
NUM_REQUESTS = 40
NEVER = (BadRequest, NotUnderstood, RemoteError, ScriptError)
"""What no fault may cause: a request here is a good one, and so is every script."""

TWO_PARTS = """
from callboard.router import Fleet, Request, least_loaded

async def route(request: Request, fleet: Fleet):
    p, d = least_loaded(fleet.prefill), least_loaded(fleet.decode)
    middle = request.num_tokens // 2
    async with d.prep_recv(request) as kv:
        await p.remote_send(request, kv, end=middle)
        await (d if request.num_tokens % 2 else p).remote_send(request, kv, begin=middle)
        async for token in d.start_generate(request, begin=kv.end, kv=kv):
            yield token
"""
GENERATE_BEFORE_SENT = """
import asyncio
from callboard.router import Fleet, Request, least_loaded

async def route(request: Request, fleet: Fleet):
    p, d = least_loaded(fleet.prefill), least_loaded(fleet.decode)
    async with d.prep_recv(request) as kv, asyncio.TaskGroup() as group:
        group.create_task(p.remote_send(request, kv))
        async for token in d.start_generate(request, kv=kv):
            yield token
"""


class Chaos:
    """One seed's fleet, load and faults."""

    def __init__(self, seed: int, folder: Path, *, has_faults: bool) -> None:
        self.seed = seed
        self.rng = rng = Random(seed)
        self.has_faults = has_faults
        own = []
        for name, text in (("two_parts", TWO_PARTS), ("generate_before_sent", GENERATE_BEFORE_SENT)):
            path = folder / f"{name}.py"
            path.write_text(text)
            own.append(str(path))
        self.hub = SimHub(seed)
        self.engines = rng.choice([("p", "d"), ("a", "b"), ("p1", "p2", "d"), ("a",), ("p", "d1", "d2")])
        self.is_shared = rng.random() < 0.5
        self.simulation = Simulation(
            seconds_per_step=rng.choice([0.0, 0.001, 0.01]),
            seconds_per_prefill_token=rng.choice([0.0, 0.0002]),
            eos_token_id=None,
        )
        self.options: dict[str, Any] = {
            "script": rng.choice(["disaggregate", "balanced", "round_robin", *own]),
            "num_blocks": rng.choice([18, 24, 40, 80]),
            "lease_s": rng.choice([1.0, 10.0]),
            "max_num_seqs": rng.choice([1, 2, 8, 64]),
            "max_num_batched_tokens": rng.choice([8, 16, 64, 512]),
            "num_layer_groups": rng.choice([1, 4]),
            "max_buffered_tokens": rng.choice([4, 256]),
        }
        self.num_finished = 0

    async def run(self) -> None:
        async with running_fleet(
            layout=LAYOUT,
            engines=self.engines,
            is_shared=self.is_shared,
            hub=self.hub,
            clock=VirtualClock(),
            seed=self.seed,
            simulated=self.simulation,
            **self.options,
        ) as fleet:
            async with asyncio.TaskGroup() as group:
                for i in range(NUM_REQUESTS):
                    group.create_task(self.request(fleet, i))
                if self.has_faults:
                    group.create_task(self.faults(fleet))
            await asyncio.sleep(60)  # Leases of those that left have run out.
            await fleet.assert_nothing_leaks()
            for actor in fleet.actors.values():
                if isinstance(actor, Engine):
                    assert not len(actor.scheduler)
                    actor.scheduler.check_integrity()
            router: Any = fleet.actors["main"]
            assert router.num_in_flight == 0
            assert all(router.loads.num_own(engine) == 0 for engine in self.engines)
        assert self.num_finished >= (1 if self.has_faults else NUM_REQUESTS // 2)

    async def request(self, fleet: Fleet, i: int) -> None:
        rng = self.rng
        await asyncio.sleep(rng.uniform(0, 2))
        prompt = [i % 7, *range(rng.choice([0, 1, 14, 15, 16, 31, 33, 64, 100, 119]))]
        sampling = SamplingParams(
            max_tokens=rng.randrange(1, 50),
            ignore_eos=True,
            temperature=rng.choice([0.0, 1.0]),
            seed=rng.choice([0, -5, 2**63 + 3]),
        )
        patience = rng.choice([rng.uniform(0, 0.5), 1000.0, 1000.0])
        failure: Exception | None = None
        try:
            async with asyncio.timeout(patience):
                got = await fleet.generate(prompt, sampling, request_id=f"r{i}")
        except (TimeoutError, BusError) as error:
            failure = error
        if failure is not None:
            has_left = patience < 1000 and type(failure) is TimeoutError
            assert has_left or (self.has_faults and not isinstance(failure, NEVER)), repr(failure)
            return
        assert got.tokens == simulated_tokens(prompt, sampling.max_tokens, self.simulation, sampling)
        assert got.usage is not None
        assert 0 <= got.usage.num_cached_tokens <= len(prompt) == got.usage.num_prompt_tokens
        self.num_finished += 1

    async def faults(self, fleet: Fleet) -> None:
        for _ in range(self.rng.randrange(1, 4)):
            await asyncio.sleep(self.rng.uniform(0.05, 0.8))
            if self.rng.random() < 0.2:
                self.hub.cut(self.rng.choice(sorted(self.hub.transports)))
            else:
                engine = self.rng.choice(self.engines)
                manager = "kv" if self.is_shared else f"kv-{engine}"
                await self.restart(fleet, self.rng.choice([engine, manager]), is_crash=self.rng.random() < 0.5)

    async def restart(self, fleet: Fleet, name: str, *, is_crash: bool) -> None:
        actor: Any = fleet.actors[name]
        if is_crash:
            actor.node.crash(name, RuntimeError("planted"))
            await asyncio.sleep(0.01)
        else:
            await stop_actor(actor)
        await asyncio.sleep(self.rng.uniform(0, 0.3))
        successor = type(actor)(actor.config)
        await start_actor(actor.node, name, successor, directory=actor.directory)
        fleet.actors[name] = successor
        fleet.stack.push_async_callback(stop_actor, successor)


def seeds() -> list[int]:
    first, _, last = os.environ.get("CHAOS_SEEDS", "0:12").partition(":")
    return list(range(int(first), int(last)))


@pytest.mark.parametrize("seed", seeds())
@pytest.mark.parametrize("has_faults", [False, True], ids=["calm", "faults"])
def test_every_request_ends_rightly_and_nothing_leaks(
    seed: int, has_faults: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("CRITICAL")  # Planted crashes are logged with their tracebacks.
    run_virtual(lambda: Chaos(seed, tmp_path, has_faults=has_faults).run())
