"""Kill random processes of a fleet under load, and look at what its clients saw: ``make kills KILLS=100``."""

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from tiny_models import tiny_model

from .served import Served, quantile, served

ENGINES = {"p": ("prefill", "cpu:0"), "d": ("decode", "cpu:1"), "e": ("decode", "cpu:0")}
MANAGERS = ("kv-cpu0", "kv-cpu1")
ROUTERS = ("main-0", "main-1")
TWO_ROUTERS = 'count = 2\nrestart = { backoff = "50ms", max = 1000 }\n'
NUM_STREAMS = 8


class Kills:
    """What was killed when, and what it cost."""

    def __init__(self, fleet: Served) -> None:
        self.fleet = fleet
        self.done: list[tuple[str, float]] = []

    async def run(self, num_kills: int, *, seed: int = 0, says: bool = False) -> None:
        """Keep the fleet busy; kill so many times, each once all are back; wait for the last request."""
        rng, stop = random.Random(seed), asyncio.Event()
        load = asyncio.ensure_future(self.fleet.keep_busy(NUM_STREAMS, stop, seed=seed))
        try:
            for number in range(num_kills):
                await self.fleet.until_ready(*ENGINES, *MANAGERS, *ROUTERS)
                await asyncio.sleep(rng.uniform(0.1, 1.0))
                # In the short version, too, one of each kind.
                kinds = (("d", "e"), MANAGERS, ("p",), ROUTERS)
                target = rng.choice(kinds[number] if number < len(kinds) else sum(kinds, ()))
                os.kill(self.fleet.pid(target), signal.SIGKILL)
                self.done.append((target, time.monotonic()))
                if says:
                    print(f"\rkilled {number + 1} of {num_kills}", end="", file=sys.stderr, flush=True)
                await asyncio.sleep(0.3)
            await self.fleet.until_ready(*ENGINES, *MANAGERS, *ROUTERS)
        finally:
            stop.set()
            await load

    def report(self) -> str:
        """Say how long streams stood still around kills, beside how long they do else."""
        gaps = [gap for answer in self.fleet.answers for gap in answer.gaps]
        lines = [
            f"{len(self.done)} kills, {len(self.fleet.answers)} requests, "
            f"{sum(bool(answer.error) for answer in self.fleet.answers)} failed",
            f"seconds between chunks: median {quantile(gaps, 0.5):.4f}, P99 {quantile(gaps, 0.99):.4f}",
        ]
        for target in sorted({name for name, _ in self.done}):
            moments = [at for name, at in self.done if name == target]
            around = [gap for at in moments for a in self.fleet.answers if (gap := a.gap_around(at)) is not None]
            if around:
                lines.append(
                    f"the one around a kill of {target}, of {len(around)} streams: median {quantile(around, 0.5):.3f}, "
                    f"P90 {quantile(around, 0.9):.3f}, longest {max(around):.3f}"
                )
        return "\n".join(lines)


def main() -> int:
    """Run it as a command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cbs", dir="/tmp") as folder:
        with served(Path(folder), ENGINES, script="disaggregate", more=TWO_ROUTERS) as fleet:
            kills = Kills(fleet)
            asyncio.run(kills.run(arguments.kills, seed=arguments.seed, says=True))
            print(f"\n{kills.report()}")
            asyncio.run(fleet.assert_all_free())
        fleet.assert_answers_pass_oracle(tiny_model("llama3"))
    print("every request has ended with the right tokens, and every block is free or cached")
    return 0


if __name__ == "__main__":
    sys.exit(main())
