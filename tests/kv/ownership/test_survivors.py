"""An engine that is killed under load, and a KV manager: real processes, a simulated model.

The pool outlives the one; what hung on the other goes elsewhere, or ends.
"""

import asyncio
import re
from pathlib import Path

from real_fleet import RealFleet, real_fleet
from waiting import PATIENCE_S, until

from callboard.actors.engine.simulated import Simulation, simulated_tokens
from callboard.actors.protocol import Generate, GetKvStats, KvStats, ListEntries, SamplingParams, StartGenerate, Token
from callboard.bus import BusError
from callboard.kv.tokens import pack_tokens

SIMULATION = Simulation(num_layers=2, seconds_per_step=0.005, seconds_per_prefill_token=0.001)
PROMPT = [7 * i % 900 for i in range(200)]
FULL = 200 // 16 * 16
NUM_TOKENS = 40


class Asked:
    """One request, and what has come of it."""

    def __init__(self, fleet: RealFleet, name: str, prompt: list[int], *, to: str) -> None:
        self.prompt = prompt
        self.tokens: list[Token] = []
        self.error: BaseException | None = None
        self._to = fleet.client.ref(fleet.address("control" if to == "main" else to, to))
        sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
        self._message: Generate | StartGenerate = (
            Generate(name, "tiny", pack_tokens(prompt), sampling)
            if to == "main"
            else StartGenerate(name, 0, pack_tokens(prompt), sampling)
        )

    async def run(self) -> None:
        try:
            async with self._to.stream(self._message, timeout=30) as items:
                async for token in items:
                    self.tokens.append(token)
        except BusError as error:
            self.error = error
        wanted = simulated_tokens(self.prompt, NUM_TOKENS, SIMULATION)
        assert [token.id for token in self.tokens] == wanted[: len(self.tokens)]
        assert self.error is not None or len(self.tokens) == NUM_TOKENS


async def stats(fleet: RealFleet, engine: str) -> KvStats:
    ref = fleet.client.ref(fleet.address(f"kv-{engine}", f"kv-{engine}"))
    found = await ref.ask(GetKvStats(), timeout=5)
    assert found.problems == ()
    return found


async def hit_tokens(fleet: RealFleet, manager: str) -> int:
    directory = fleet.client.ref(fleet.address("directory", "directory"))
    entries = (await directory.ask(ListEntries(), timeout=5)).entries
    return sum(entry.counters.num_hit_tokens for entry in entries if entry.name == manager)


async def until_ready(fleet: RealFleet, *engines: str) -> None:
    directory = fleet.client.ref(fleet.address("directory", "directory"))
    while True:
        entries = {entry.name: entry for entry in (await directory.ask(ListEntries(), timeout=5)).entries}
        if all(name in entries and entries[name].state == "ready" for name in engines):
            return
        await asyncio.sleep(0.02)


async def test_the_pool_outlives_its_engine_and_requests_their_kv_manager(tmp_path: Path) -> None:
    async with asyncio.timeout(3 * PATIENCE_S), real_fleet(tmp_path) as fleet:
        (a, kv_a), b = fleet.engine("a", SIMULATION, num_blocks=128), fleet.engine("b", SIMULATION, num_blocks=128)
        await fleet.start(fleet.directory(), kv_a, a, *b, fleet.router())
        await until_ready(fleet, "a", "b")

        first = Asked(fleet, "first", PROMPT, to="a")
        await first.run()
        assert first.error is None
        before = await stats(fleet, "a")
        assert before.cached >= FULL // 16

        # Killed under load, some of it with blocks that are cached and in use.
        load = [Asked(fleet, f"load-{i}", [*PROMPT[: 32 * i], *range(100 * i, 100 * i + 50)], to="a") for i in range(4)]
        running = [asyncio.ensure_future(each.run()) for each in load]
        await until(lambda: all(len(each.tokens) >= 2 for each in load))
        assert (await stats(fleet, "a")).leased
        await fleet.kill("a")
        await asyncio.gather(*running)
        assert all(each.error is not None for each in load)
        found = await stats(fleet, "a")
        while found.leased:
            await asyncio.sleep(0.01)
            found = await stats(fleet, "a")
        assert (found.quarantined, found.reserved) == (0, 0), "its death is proven"
        assert found.cached >= before.cached
        assert found.free + found.cached == 128

        # The next one starts warm.
        hits = await hit_tokens(fleet, "kv-a")
        await fleet.start(a)
        again = Asked(fleet, "again", PROMPT, to="a")
        await again.run()
        assert again.error is None
        usage = again.tokens[-1].usage
        assert usage is not None
        assert (usage.num_cached_tokens, usage.num_computed_tokens) == (FULL, 200 - FULL)
        async with asyncio.timeout(PATIENCE_S):
            while await hit_tokens(fleet, "kv-a") < hits + FULL:
                await asyncio.sleep(0.02)
        await until_ready(fleet, "a", "b")

        # Now its KV manager, while some have their first token and some do not.
        early = [Asked(fleet, f"early-{i}", [900 + i, *range(20)], to="main") for i in range(4)]
        running = [asyncio.ensure_future(each.run()) for each in early]
        await until(lambda: all(each.tokens for each in early))
        late = [Asked(fleet, f"late-{i}", [800 + i, *range(400)], to="main") for i in range(4)]
        running += [asyncio.ensure_future(each.run()) for each in late]
        await asyncio.sleep(0.1)  # They are being computed, for 0.4 s each.
        waiting = [each for each in late if not each.tokens]
        await fleet.kill("kv-a")
        await asyncio.gather(*running)
        assert [each.error for each in waiting] == [None] * len(waiting), "they go elsewhere"
        assert len(waiting) >= 2
        assert any(each.error is None for each in early), "those of the other engine go on"
        assert re.search(r"follows( behind \d+ tokens)? after ActorDied", fleet.log("control"))
        after = [Asked(fleet, f"after-{i}", [700 + i, *range(20)], to="main") for i in range(4)]
        await asyncio.gather(*(each.run() for each in after))
        assert [each.error for each in after] == [None] * 4
        await fleet.assert_all_free("b")
