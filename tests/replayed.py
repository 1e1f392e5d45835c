"""Recordings of simulated fleets on the virtual clock, made of the production actors, for tests of the replay."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from fleet import running_fleet

from callboard.actors.engine.simulated import SimulatedRunner, Simulation
from callboard.actors.protocol import Generate, ListEntries, SamplingParams
from callboard.actors.trace_protocol import Follow
from callboard.actors.tracer import body_writer
from callboard.bus import BusError, VirtualClock
from callboard.bus.taps import BODY, NO_BODY, Row, TapRecord, finished
from callboard.bus.testing import run_virtual
from callboard.bus.transports.sim import SimHub, Weather
from callboard.kv.tokens import pack_tokens
from callboard.tools.trace.event import Event, event_of
from callboard.tools.trace.recording import Header
from callboard.tools.trace.recording_writer import RecordingWriter

BEGIN_S = 1.0
"""When the load begins: engines report theirs at times that count from their start, and it matters when."""
MODEL = Simulation(seconds_per_step=4e-3, seconds_per_prefill_token=0.08e-3, seconds_per_decode=0.3e-3, vocab_size=300)


@dataclass(frozen=True)
class Load:
    """One request to come: when, its prompt, how long its answer is, and after how many tokens its client leaves."""

    time: float
    prompt: tuple[int, ...]
    max_tokens: int
    leaves_after: int | None = None


def load(num: int, *, seed: int = 0, per_s: float = 8.0, leaves: float = 0.0) -> list[Load]:
    """Poisson arrivals with a few shared beginnings."""
    rng, time, loads = Random(seed), 0.0, []
    beginnings = [[rng.randrange(1, 200) for _ in range(length)] for length in (0, 160, 400)]
    for _ in range(num):
        prompt = rng.choice(beginnings) + [rng.randrange(1, 200) for _ in range(rng.randrange(10, 500))]
        max_tokens = rng.randrange(1, 60)
        leaves_after = rng.randrange(1, max_tokens + 1) if rng.random() < leaves else None
        loads.append(Load(time, tuple(prompt), max_tokens, leaves_after))
        time += rng.expovariate(per_s)
    return loads


def record(
    path: Path,
    loads: Sequence[Load],
    *,
    script: str = "disaggregate",
    options: dict[str, Any] | None = None,
    engines: tuple[str, ...] = ("d0", "d1", "p0", "p1"),
    model: Simulation = MODEL,
    bodies: Any = "hashed",
    seed: int = 3,
    ids: Callable[[int], str] = "request-{}".format,
    **fleet_options: Any,
) -> list[Event]:
    """Run the load on a simulated fleet, keep what its nodes tell in a recording, and return that, too."""
    events: list[Event] = []
    weather = Weather(0.2e-3, 0.2e-3)

    async def main() -> None:
        async with running_fleet(
            layout=SimulatedRunner(model).layout,
            engines=engines,
            script=script,
            options=options,
            hub=SimHub(seed, weather=weather),
            clock=VirtualClock(),
            seed=seed,
            simulated=model,
            **fleet_options,
        ) as fleet:
            write = body_writer(Follow(bodies=bodies, salt=b"salt"))
            for name, node in fleet.nodes.items():

                def follow(row: Row, message: Any, name: str = name) -> None:
                    body = NO_BODY if message is None or bodies == "none" else write(message)
                    events.append(event_of(TapRecord(*finished(row)[:BODY], body), name))

                node.follow(follow)
            began = BEGIN_S
            await asyncio.sleep(began - fleet.client.clock.now())

            async def ask(number: int, each: Load) -> None:
                await asyncio.sleep(began + each.time - fleet.client.clock.now())
                sampling = SamplingParams(max_tokens=each.max_tokens, ignore_eos=True)
                message = Generate(ids(number), "tiny", pack_tokens(each.prompt), sampling)
                num_read = 0
                try:
                    async with fleet.router.stream(message, timeout=600.0) as tokens:
                        async for _ in tokens:
                            num_read += 1
                            if num_read == each.leaves_after:
                                return
                except BusError:
                    pass  # It is in the recording.

            await asyncio.gather(*(ask(number, each) for number, each in enumerate(loads)))
            entries = (await fleet.client.ref(fleet.actors["directory"].ref.address).ask(ListEntries())).entries
            header = Header("abc", 0, "test", "0.1.0", 0.0, bodies)
            with RecordingWriter(path, header, now=lambda: 0.0, wall=lambda: 0.0) as writer:
                writer.view(entries)
                writer.add(events)

    run_virtual(main)
    return events


# ---- what replays are told of ----

SCRIPT = """
async def route(request, fleet, *, where: str = "d0"):
    engine = next(engine for engine in fleet.engines if engine.name == where)
    async for token in engine.start_generate(request):
        yield token
"""

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "max_position_embeddings": 4096,
    "vocab_size": 256,
}

FLEET = """
name = "big"
[models.tiny]
path = "model"
[defaults.kv]
size = "1MiB"
[[engine]]
name = "x"
runner = "simulated"
device = "cpu:0"
count = {count}
max_num_seqs = 8
[[router]]
name = "front"
script = "least_loaded"
"""
