"""Does the KV of a prompt leave while the rest of it is computed?

A prompt is computed by a real engine (a model of SmolLM2-135M's shape, float32, one thread) and sent from its KV
manager to another, over a lane that carries b bytes/s: a wrapper around the lane that the two managers have chosen.
Engine and managers are processes of their own; the engine has a core to itself. Each time the prefill is measured
alone, by a prompt whose KV goes nowhere, and b is then chosen so that sending takes 0.25, 0.5 or 1.0 times as long.

``total`` is what the router waits for: ``remote_send`` from the question to the answer. It should be at most the longer
of computing and sending, plus 1.5 layer groups (a group can leave only when it is computed, and the last one leaves
when nothing is left to compute), plus 5%. ``serial`` is that prefill alone, and then all of its KV sent at once.
``tail`` is what is sent after the last layer was computed (``Sent.tail_s``): under two groups' worth.

``--device cuda`` does it between two engines' pools on one GPU, with no limit: then the total is held against 1.05
times the prefill alone. Where there is no CUDA device it says so and ends. ``--simulated`` has an engine that sleeps
instead of computing: then nothing but the pipeline is measured, and neither cores nor memory are fought for.
"""

import contextlib
import ctypes
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import uvloop
from _overlap_side import Config, SetRate
from _report import arguments, goal, median, report, spread

from callboard.actors.protocol import PrepRecv, Release, RemoteSend, Sent
from callboard.bus import Node, Ref
from callboard.kv.tokens import pack_tokens

SHARES = (0.25, 0.5, 1.0)
START_S = 120.0
SIDE = Path(__file__).with_name("_overlap_side.py")


@dataclass
class Runs:
    """What one share gave, round by round; all in seconds."""

    prefill: list[float] = field(default_factory=list)
    send: list[float] = field(default_factory=list)
    """Of sending alone: bytes through rate."""
    total: list[float] = field(default_factory=list)
    serial: list[float] = field(default_factory=list)
    tail: list[float] = field(default_factory=list)
    compute: list[float] = field(default_factory=list)
    """The engine's own, while pages leave."""


class Fleet:
    """Two managers and an engine, as a router sees them."""

    def __init__(self, node: Node, config: Config) -> None:
        self.config = config
        self._p, self._d, self._link = (node.ref(config.address(name)) for name in ("p", "d", "p"))
        self._link = node.ref(msgspec.structs.replace(config.address("p"), actor="link"))
        self._rng = random.Random(3)
        self._count = 0

    def new_prompt(self) -> bytes:
        return pack_tokens([self._rng.randrange(3, 1000) for _ in range(self.config.num_tokens)])

    async def set_rate(self, bytes_per_s: float) -> None:
        await self._link.ask(SetRate(bytes_per_s))

    async def send(self, prompt: bytes, *, is_here: bool = False) -> tuple[Sent, float]:
        """Have the KV of a prompt computed, if it is not cached, and sent; return what was said, and the seconds.

        ``is_here``: into a reservation in the same pool, where its blocks only change hands.
        """
        self._count += 1
        receiver: Ref = self._p if is_here else self._d
        reserved = await receiver.ask(PrepRecv(f"r{self._count}", 0, prompt))
        message = RemoteSend(f"r{self._count}", 0, prompt, reserved.kv, reserved.begin, None, "engine")
        begin = time.perf_counter()
        sent = await self._p.ask(message, timeout=120)
        seconds = time.perf_counter() - begin
        await receiver.ask(Release(reserved.kv))
        return sent, seconds


async def run(fleet: Fleet, rounds: int) -> dict[float, Runs]:
    """Measure every share in every round, beside the prefill alone."""
    num_bytes = fleet.config.num_tokens * fleet.config.layout.token_bytes
    runs = {share: Runs() for share in SHARES}
    await fleet.set_rate(0.0)
    for is_here in (False, True):  # Once unseen: pools are touched, lanes are opened.
        await fleet.send(fleet.new_prompt(), is_here=is_here)
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
        for share, found in runs.items():
            alone = fleet.new_prompt()
            _, prefill = await fleet.send(alone, is_here=True)
            await fleet.set_rate(num_bytes / (share * prefill))
            sent, total = await fleet.send(fleet.new_prompt())
            if (sent.num_bytes, sent.num_computed_tokens) != (num_bytes, fleet.config.num_tokens):
                sys.exit(f"{sent.num_bytes} bytes of {num_bytes} were sent, {sent.num_computed_tokens} tokens computed")
            cached, then = await fleet.send(alone)
            if cached.num_computed_tokens:
                sys.exit("what was computed before it was sent was computed again")
            found.prefill.append(prefill)
            found.send.append(share * prefill)
            found.total.append(total)
            found.serial.append(prefill + then)
            found.tail.append(sent.tail_s)
            found.compute.append(sent.compute_s)
    return runs


def limited(runs: dict[float, Runs], num_groups: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the table, and the goals."""
    rows, goals = [], []
    for share, found in runs.items():
        longer = [max(pair) for pair in zip(found.prefill, found.send, strict=True)]
        groups = [each / num_groups for each in longer]
        bound = [1.05 * each + 1.5 * group for each, group in zip(longer, groups, strict=True)]
        rows.append(
            {
                "sending / prefill": share,
                "prefill s": median(found.prefill),
                "sending s": median(found.send),
                "total s": spread(found.total),
                "at most s": median(bound),
                "serial s": spread(found.serial),
                "tail s": spread(found.tail),
                "two groups s": 2 * median(groups),
                "engine s": median(found.compute),
            }
        )
        shares = [total / most for total, most in zip(found.total, bound, strict=True)]
        tails = [tail / (2 * group) for tail, group in zip(found.tail, groups, strict=True)]
        goals.append(goal(f"sending {share} of prefill: total of what it may be", shares, "<= 1.0"))
        goals.append(goal(f"sending {share} of prefill: tail of two groups", tails, "<= 1.0"))
    return rows, goals


async def unlimited(fleet: Fleet, rounds: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the table, and the goals, of a lane that is as fast as it is."""
    totals, prefills, tails, lane = [], [], [], ""
    await fleet.set_rate(0.0)
    for is_here in (False, True):
        await fleet.send(fleet.new_prompt(), is_here=is_here)
    for _ in range(rounds):
        _, prefill = await fleet.send(fleet.new_prompt(), is_here=True)
        sent, total = await fleet.send(fleet.new_prompt())
        totals.append(total)
        prefills.append(prefill)
        tails.append(sent.tail_s)
        lane = sent.lane
    shares = [total / prefill for total, prefill in zip(totals, prefills, strict=True)]
    row = {"lane": lane, "prefill s": spread(prefills), "total s": spread(totals), "tail s": spread(tails)}
    return [row], [goal("total of the prefill alone", shares, "<= 1.05")]


class Processes:
    """The engine's and the managers' processes."""

    def __init__(self, config: Config) -> None:
        self._config = msgspec.json.encode(config).decode()
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, cores: dict[str, list[int]], *, word: bytes = b"ready\n") -> None:
        """Start one for each role, and wait for the word of each (none: for its end)."""
        for role, some in cores.items():
            command = [sys.executable, str(SIDE), role, ",".join(map(str, some)), self._config]
            self._started.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        for role, process in zip(cores, self._started[-len(cores) :], strict=True):
            assert process.stdout is not None
            is_there = select.select([process.stdout], [], [], START_S)[0]
            if not is_there or process.stdout.readline() != word:
                sys.exit(f"{role} did not start")

    def close(self) -> None:
        for process in reversed(self._started):
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def what_lacks(device: str) -> str:
    """Say what keeps the bench from running on a device, "" if nothing does."""
    if device == "cpu":
        return ""
    try:
        ctypes.CDLL("libcuda.so.1")
        import torch
    except (OSError, ImportError) as error:
        return f"there is no CUDA here ({error})"
    return "" if torch.cuda.is_available() else "there is no CUDA device"


async def measure(config: Config, rounds: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Start everything, measure, end everything."""
    found = sorted(os.sched_getaffinity(0))
    engine_cores, others = (found[:1], found[1:]) if len(found) > 1 else (found, found)
    with contextlib.ExitStack() as stack:
        processes = Processes(config)
        stack.callback(processes.close)
        if config.prefill_s is None:
            processes.start({"model": found}, word=b"")
        processes.start({"p": others, "d": others, "engine": engine_cores})
        async with Node("router") as node:
            fleet = Fleet(node, config)
            if config.device != "cpu":
                return await unlimited(fleet, rounds)
            return limited(await run(fleet, rounds), config.num_groups * config.num_chunks)


def main() -> None:
    options = arguments(
        __doc__ or "",
        rounds={"type": int, "default": 7, "help": "rounds (7)"},
        tokens={"type": int, "help": "the prompt's length (512, quick 256)"},
        layers={"type": int, "help": "the model's layers (30, as many as SmolLM2-135M has; quick 16)"},
        chunks={"type": int, "default": 1, "help": "steps that the prompt is computed in (1)"},
        groups={"type": int, "default": 4, "help": "layer groups of a step (4)"},
        simulated={"type": float, "metavar": "S", "help": "an engine that sleeps for S seconds instead of computing"},
        lane={"default": "shm", "help": "the kind of lane that is limited: shm, ucx (shm)"},
        device={"default": "cpu", "help": "cpu, or cuda: between two engines' pools on one GPU"},
    )
    if lacks := what_lacks(options.device):
        print(f"nothing was measured: {lacks}", file=sys.stderr)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # What is up is ended on the way out.
    is_cpu = options.device == "cpu"
    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            folder,
            num_layers=options.layers or (16 if options.quick else 30),
            num_tokens=options.tokens or (256 if options.quick else 512),
            num_chunks=options.chunks,
            num_groups=options.groups,
            device=options.device if is_cpu or ":" in options.device else f"{options.device}:0",
            transport=options.lane if is_cpu else "auto",
            dtype="float32" if is_cpu else "bfloat16",
            prefill_s=options.simulated,
        )
        rows, goals = uvloop.run(measure(config, 1 if options.quick else options.rounds))
    report("overlap" if is_cpu else "overlap on a GPU", rows, goals, options.json)


if __name__ == "__main__":
    main()
