"""How fast do KV pages get from one pool into another?

Two processes, each on cores of its own, move 1, 16 and 256 MiB of pages from scattered blocks of one pool into
scattered blocks of another: a group of 8 layers of Llama-3.1-8B (8 KV heads of 128, bf16, blocks of 16 tokens), so that
16 MiB are 512 tokens in 512 pages of 32 KiB. Both pools are memfds that every process maps and has touched. A job ends
when every page is in its place and the sending end knows it; after each one that is looked at, outside of the time.

On one host: ``shm`` is the lane between two real KV managers; ``memcpy`` copies as many bytes in one piece, and
``memcpy of pages`` the same pages one by one in C; ``shared pool`` is the hand-off between two engines of one manager,
all its messages included. Across hosts, here over TCP on the loopback device: ``ucx`` is the lane between two real KV
managers, the peers gather, send and scatter as ``_transfer_peers`` says, each with its best settings.

Rounds alternate: in each, every side does every job, and a ratio is of the same job in the same round. CPU is of both
processes. The time of ``shm`` and ``ucx`` is the lane's own; with the messages around it, it is *whole*.
"""

import contextlib
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from _report import arguments, goal, median, report
from _transfer_job import LAYOUT, MIB, NUM_BLOCKS, Job, Moved
from _transfer_sides import Pools, Side, cores, what_lacks
from rich.console import Console

ONE_HOST = ("shared pool", "shm", "memcpy", "memcpy of pages", "process_vm_readv")
ACROSS = ("ucx", "NIXL", "NIXL packed", "ZeroMQ", "gloo")
SIZES = {1: 8, 16: 4, 256: 1}
"""How many jobs of so many MiB a side does in a round."""
QUICK_SIZES = {1: 4, 16: 2, 256: 1}
BUSY_LOAD = 0.5
Times = dict[tuple[str, int], list[Moved]]


def run(sides: list[Side], sizes: dict[int, int], rounds: int, console: Console) -> Times:
    """Warm everything up, then have every side do every job in every round, in turn forwards and backwards."""
    seeds = iter(range(1, 1 << 30))
    for side in sides:
        # Every block is touched once, in every process that will touch it.
        for _ in range(2):
            side.move(Job(NUM_BLOCKS // 2, next(seeds)), is_checked=False)
    times: Times = {(side.name, size): [] for side in sides for size in sizes}
    for number in range(rounds):
        console.print(f"round {number + 1} of {rounds}")
        for size, count in sizes.items():
            for side in sides if number % 2 == 0 else reversed(sides):
                jobs = [Job(size * MIB // LAYOUT.block_bytes, next(seeds)) for _ in range(count)]
                times[side.name, size].append(typical([side.move(job) for job in jobs]))
    return times


def typical(moved: list[Moved]) -> Moved:
    """Return the medians of a side's jobs in a round."""
    return Moved(
        median([each.seconds for each in moved]),
        median([each.cpu_s for each in moved]),
        whole_s=median([each.whole_s for each in moved]),
        num_bytes=moved[0].num_bytes,
    )


def ratios(times: Times, side: str, base: str, size: int) -> list[float]:
    """Return how fast a side was beside another, round by round."""
    return [b.seconds / a.seconds for a, b in zip(times[side, size], times.get((base, size), []), strict=False)]


def rows(times: Times, sizes: list[int]) -> list[dict[str, Any]]:
    """Return both tables."""
    found = []
    for where, names, base in (("on one host", ONE_HOST, "memcpy"), ("across hosts, by TCP", ACROSS, "NIXL")):
        for name in names:
            if not times.get((name, sizes[0])):
                continue
            row: dict[str, Any] = {"where": where, "lane": name}
            for size in sizes:
                each = times[name, size]
                is_moved = each[0].num_bytes != 0
                row[f"{size} MiB ms"] = 1e3 * median([moved.seconds for moved in each])
                row[f"{size} MiB GB/s"] = (
                    median([size * MIB / moved.seconds / 1e9 for moved in each if is_moved]) or None
                )
                row[f"{size} MiB x {base}"] = (median(ratios(times, name, base, size)) if is_moved else 0) or None
            largest = times[name, sizes[-1]]
            row["CPU s a GB"] = median([moved.cpu_s / (sizes[-1] * MIB) * 1e9 for moved in largest])
            row["whole ms"] = 1e3 * median([moved.whole_s for moved in largest]) or None
            row["bytes moved"] = sizes[-1] * MIB if largest[0].num_bytes is None else largest[0].num_bytes
            found.append(row)
    return found


def goals(times: Times, sizes: list[int]) -> list[dict[str, Any]]:
    """Return what was to be reached, of the sides that were there."""
    found = []
    for base in ("memcpy", "memcpy of pages"):
        for size in sizes[1:]:
            if shares := ratios(times, "shm", base, size) if ("shm", size) in times else []:
                found.append(goal(f"shm at {size} MiB, of {base}", shares, ">= 0.85"))
    for size in sizes:
        peers = [name for name in ("NIXL", "NIXL packed") if times.get((name, size))]
        if times.get(("ucx", size)) and peers:
            best = min(peers, key=lambda name: median([moved.seconds for moved in times[name, size]]))
            found.append(goal(f"ucx at {size} MiB, of {best}", ratios(times, "ucx", best, size), ">= 1.0"))
    handed = [moved for (name, _), each in times.items() if name == "shared pool" for moved in each]
    if handed:
        found.append(goal("bytes moved in a shared pool", float(max(moved.num_bytes or 0 for moved in handed)), "<= 0"))
    return found


def main() -> None:
    options = arguments(
        __doc__ or "",
        rounds={"type": int, "default": 15, "help": "rounds of all sides (15)"},
        sizes={"default": ",".join(map(str, SIZES)), "help": "MiB of the jobs (1,16,256)"},
        sides={"default": ",".join(ONE_HOST + ACROSS), "help": f"which sides to run ({','.join(ONE_HOST + ACROSS)})"},
        unpinned={"action": "store_true", "help": "leave all processes to the system's scheduler"},
    )
    rounds = 2 if options.quick else options.rounds
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # What is up is ended on the way out.
    console = Console(stderr=True)
    wanted = options.sides.split(",")
    if unknown := set(wanted) - {*ONE_HOST, *ACROSS}:
        sys.exit(f"there is no side {', '.join(sorted(unknown))}: the sides are {', '.join(ONE_HOST + ACROSS)}")
    for name in wanted:
        if lacks := what_lacks(name):
            console.print(f"{name} is left out: {lacks}")
    counts = QUICK_SIZES if options.quick else SIZES
    sizes = {size: counts.get(size, 1) for size in sorted(map(int, options.sizes.split(",")))}
    where = cores(is_pinned=not options.unpinned)
    console.print(f"{where}; {rounds} rounds")
    if (load := os.getloadavg()[0]) > BUSY_LOAD:
        console.print(f"this machine is busy (load {load:.1f}): sides that need more processor time lose more by it")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        pools = Pools()
        sides = [Side(name, Path(folder), pools, where) for name in wanted if not what_lacks(name)]
        for side in sides:
            stack.callback(side.close)
            side.start_far()
        for side in sides:
            side.start_near()
        for side in sides:
            side.await_ready()
        times = run(sides, sizes, rounds, console)
    report("transfer", rows(times, list(sizes)), goals(times, list(sizes)), options.json, by="where")


if __name__ == "__main__":
    main()
