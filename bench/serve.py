"""What does a client of the default fleet get, against transformers' generate() on the same cores?

Three sides take turns in one run, with the same prompts and output lengths: the default fleet (one prefill and one
decode engine, a core each), one engine on both cores, and transformers generate() with static batches on both cores.
Clients are closed loops: each sends its next request when the last has ended. Prompts are random token ids, so that
no prefix is shared.
"""

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from _report import arguments, goal, median, percentile, report, spread

from callboard.actors.embedded_model import cached_directory, embedded_gguf
from callboard.tools.running import cache_dir

PROMPT_TOKENS = 128
NEW_TOKENS = 32
MODEL = "smollm2-135m"
ONE_ENGINE = """\
version = 1
name = "{name}"
[listen]
http = "127.0.0.1:0"
[models.smollm2-135m]
path = "embedded"
[[engine]]
name = "both"
device = "cpu"
[[router]]
name = "main"
script = "round_robin"
"""


@dataclass
class Round:
    """One side's numbers at one concurrency in one round. Seconds."""

    ttft: list[float] = field(default_factory=list)
    itl: list[float] = field(default_factory=list)
    jct: list[float] = field(default_factory=list)
    seconds: float = 0.0
    cpu_engine_s: float = 0.0
    cpu_other_s: float = 0.0
    memory_mib: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return len(self.jct) * NEW_TOKENS / self.seconds


class FleetSide:
    """A fleet of Callboard's, over HTTP."""

    def __init__(self, name: str, file: Path | None) -> None:
        self.fleet = f"bench-{name}-{os.getpid()}"
        self.file = file
        self.url = ""
        self.pids: dict[str, list[int]] = {}

    def up(self) -> None:
        command = [sys.executable, "-m", "callboard.tools.cli", "up", "--detach", "--name", self.fleet, "--port", "0"]
        subprocess.run([*command, *([str(self.file)] if self.file else [])], check=True, stdout=subprocess.DEVNULL)
        command = [sys.executable, "-m", "callboard.tools.cli", "ps", self.fleet, "--json"]
        (found,) = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        self.url = found["url"]
        self.pids = {"engine": [], "other": []}
        for actor in found["actors"]:
            self.pids["engine" if actor["kind"] == "engine" else "other"].append(actor["pid"])
        self.pids["other"].append(found["launcher_pid"])
        self.pids = {kind: sorted(set(pids)) for kind, pids in self.pids.items()}

    def down(self) -> None:
        subprocess.run([sys.executable, "-m", "callboard.tools.cli", "down", self.fleet], stdout=subprocess.DEVNULL)

    async def round(self, prompts: list[list[int]], concurrency: int) -> Round:
        """Send all prompts, ``concurrency`` at a time."""
        result = Round()
        waiting = iter(prompts)
        before = {kind: sum(map(cpu_seconds, pids)) for kind, pids in self.pids.items()}
        start = time.perf_counter()
        async with httpx.AsyncClient(base_url=self.url, timeout=600) as client, asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(self._client(client, waiting, result))
        result.seconds = time.perf_counter() - start
        after = {kind: sum(map(cpu_seconds, pids)) for kind, pids in self.pids.items()}
        result.cpu_engine_s, result.cpu_other_s = (after[kind] - before[kind] for kind in ("engine", "other"))
        result.memory_mib = sum(memory_mib(pid) for pids in self.pids.values() for pid in pids)
        return result

    async def _client(self, client: httpx.AsyncClient, waiting: Iterator[list[int]], result: Round) -> None:
        for prompt in waiting:
            body = {
                "model": MODEL,
                "prompt": prompt,
                "max_tokens": NEW_TOKENS,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            start = time.perf_counter()
            arrivals: list[float] = []
            num_tokens = 0
            async with client.stream("POST", "/v1/completions", json=body) as response:
                assert response.status_code == 200, await response.aread()
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        event = json.loads(line[6:])
                        if event.get("usage"):
                            num_tokens = event["usage"]["completion_tokens"]
                        if event["choices"]:
                            arrivals.append(time.perf_counter())
            assert num_tokens == NEW_TOKENS, num_tokens
            result.jct.append(time.perf_counter() - start)
            result.ttft.append(arrivals[0] - start)
            result.itl.append((arrivals[-1] - arrivals[0]) / (NEW_TOKENS - 1))


class StaticBatches:
    """transformers generate() in a process of its own."""

    def __init__(self, path: str, num_threads: int) -> None:
        command = [sys.executable, str(Path(__file__).with_name("_static_batches.py")), path, str(num_threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("transformers' process ended")
        return line.strip()

    def round(self, prompts: list[list[int]], concurrency: int) -> Round:
        result = Round()
        before = cpu_seconds(self.process.pid)
        start = time.perf_counter()
        for i in range(0, len(prompts), concurrency):
            batch = prompts[i : i + concurrency]
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps({"prompts": batch, "num_new": NEW_TOKENS}) + "\n")
            self.process.stdin.flush()
            answer = json.loads(self._line())
            first, total = answer["first_s"], answer["total_s"]
            result.ttft += [first] * len(batch)
            result.jct += [total] * len(batch)
            result.itl += [(total - first) / (NEW_TOKENS - 1)] * len(batch)
        result.seconds = time.perf_counter() - start
        result.cpu_engine_s = cpu_seconds(self.process.pid) - before
        result.memory_mib = memory_mib(self.process.pid)
        return result

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def cpu_seconds(pid: int) -> float:
    """Return user and system seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mib(pid: int) -> float:
    """Return a process's proportional set size: pages shared between processes are counted once in the sum."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    return 0.0


@contextlib.asynccontextmanager
async def sides() -> AsyncIterator[dict[str, Any]]:
    """Start the three sides; they stay up and take turns."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        file = Path(folder) / "one.toml"
        file.write_text(ONE_ENGINE.format(name="one"))
        started: dict[str, Any] = {}
        for name, path in (("fleet", None), ("one engine", file)):
            side = FleetSide(name.replace(" ", "-"), path)
            stack.callback(side.down)
            side.up()
            started[name] = side
        batches = StaticBatches(str(cached_directory(embedded_gguf(), cache_dir())), len(os.sched_getaffinity(0)))
        stack.callback(batches.close)
        started["generate()"] = batches
        yield started


async def main() -> None:
    options = arguments(__doc__ or "", rounds={"type": int, "default": 3, "help": "rounds of all three sides"})
    rng = random.Random(0)
    rounds = 1 if options.quick else options.rounds
    levels = {1: 2, 8: 8} if options.quick else {1: 6, 8: 32, 32: 64}
    results: dict[tuple[str, int], list[Round]] = {}

    def prompts(count: int) -> list[list[int]]:
        return [[rng.randrange(100, 40_000) for _ in range(PROMPT_TOKENS)] for _ in range(count)]

    async with sides() as started:
        for side in started.values():  # Warm up.
            answer = side.round(prompts(2), 1)
            await answer if asyncio.iscoroutine(answer) else None
        for number in range(rounds):
            for concurrency, count in levels.items():
                work = prompts(count)
                names = list(started)
                for name in names[number % 3 :] + names[: number % 3]:
                    print(f"round {number + 1}/{rounds}, {concurrency} at a time: {name}", file=sys.stderr)
                    answer = started[name].round(work, concurrency)
                    done = await answer if asyncio.iscoroutine(answer) else answer
                    results.setdefault((name, concurrency), []).append(done)

    rows: list[dict[str, Any]] = []
    goals: list[dict[str, Any]] = []
    for (name, concurrency), done in sorted(results.items(), key=lambda item: (item[0][1], item[0][0])):
        peer = results["generate()", concurrency]
        ratios = [mine.tokens_per_s / theirs.tokens_per_s for mine, theirs in zip(done, peer, strict=True)]
        cpu = sum(r.cpu_engine_s + r.cpu_other_s for r in done)
        rows.append(
            {
                "side": name,
                "at a time": concurrency,
                "TTFT p50 ms": median([1e3 * median(r.ttft) for r in done]),
                "TTFT p99 ms": median([1e3 * percentile(r.ttft, 0.99) for r in done]),
                "ITL ms": median([1e3 * median(r.itl) for r in done]),
                "JCT p50 ms": median([1e3 * median(r.jct) for r in done]),
                "tokens/s": median([r.tokens_per_s for r in done]),
                "tokens/s over generate()": spread(ratios),
                "memory MiB": done[-1].memory_mib,
                "CPU s per 1k tokens": 1e3 * cpu / sum(len(r.jct) * NEW_TOKENS for r in done),
                "CPU not engines %": 100 * sum(r.cpu_other_s for r in done) / cpu if cpu else 0.0,
            }
        )
        if name != "generate()":
            goals.append(goal(f"{name}, {concurrency} at a time: tokens/s over generate()", median(ratios), ">= 1.0"))
    report("serve", rows, goals, options.json)


if __name__ == "__main__":
    asyncio.run(main())
