"""How soon does a caller hear that its peer was killed?

A peer in a process of its own is killed (SIGKILL) while an ask of it is pending and a stream of it is open, over
``ipc://``, with pings too rare to tell. Measured is the time from the kill to ``ActorDied``, the later of the two.
"""

import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator

import uvloop
from _report import arguments, goal, median, percentile, report

from callboard.bus import ActorDied, Address, Ask, LinkConfig, Node, Ref, Stream


class Wait(Ask[int], frozen=True):
    pass


class Offer(Stream[int], frozen=True):
    pass


class Peer:
    """The far side: it never answers, and its stream brings one item."""

    async def on_wait(self, message: Wait) -> int:
        await asyncio.Event().wait()
        return 0

    async def on_offer(self, message: Offer) -> AsyncIterator[int]:
        yield 0
        await asyncio.Event().wait()


async def serve(endpoint: str) -> None:
    async with Node("peer", endpoint=endpoint) as node:
        node.add("peer", Peer())
        print("ready", flush=True)
        await asyncio.Event().wait()


async def hear_of_it(ref: Ref, peer: "subprocess.Popen[bytes]") -> float:
    """Kill the peer; return after how many seconds both the ask and the stream had ended."""
    async with ref.stream(Offer(), timeout=60) as items:
        await anext(items)
        asked = asyncio.ensure_future(ref.ask(Wait(), timeout=60))
        await asyncio.sleep(0.02)
        begin = time.perf_counter()
        peer.kill()
        ends = await asyncio.gather(asked, anext(items), return_exceptions=True)
        took = time.perf_counter() - begin
    if not all(isinstance(end, ActorDied) for end in ends):
        raise SystemExit(f"not every call ended with ActorDied: {ends}")
    return took


async def main() -> None:
    options = arguments(__doc__ or "", rounds={"type": int, "default": 30, "help": "kills (default 30)"})
    rounds = 5 if options.quick else options.rounds
    took = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            endpoint = f"ipc://{folder}/{number}"
            command = [sys.executable, __file__, "peer", endpoint]
            with subprocess.Popen(command, stdout=subprocess.PIPE) as peer:
                try:
                    assert peer.stdout is not None
                    assert peer.stdout.readline() == b"ready\n"
                    async with Node("caller", links=LinkConfig(ping_s=60, silent_s=600)) as node:
                        took.append(1e3 * await hear_of_it(node.ref(Address("peer", endpoint, "peer")), peer))
                finally:
                    peer.kill()
    rows = [{"kills": rounds, "median ms": median(took), "p90 ms": percentile(took, 0.9), "worst ms": max(took)}]
    report("deaths", rows, [goal("ms until ActorDied, worst of all", max(took), "<= 100")], options.json)


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[2]) if sys.argv[1:2] == ["peer"] else main())
