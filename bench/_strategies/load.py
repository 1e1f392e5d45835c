"""The client, in a process of its own: ``python -m _strategies.load FOLDER``.

It takes a Block as a line of JSON, sends its requests when they are due whether or not earlier ones were answered, and
answers with a line: what each of them met. Times run from when a request was due, not from when it was sent, so that a
client that is late cannot make the fleet look better. Prompts are made before the first one is due.
"""

import asyncio
import gc
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import msgspec
import uvloop

from callboard.actors.parent import die_with_parent
from callboard.actors.protocol import Generate, SamplingParams, StartGenerate
from callboard.bus import Address, Clock, Node, Ref
from callboard.kv.tokens import unpack_tokens

from .http import Connections, HttpDoor
from .mixes import Call, draw_prompts
from .processor import cpu_seconds

FLEET = "bench"
TIMEOUT_S = 120.0
LEAD_S = 0.05
"""Between the last preparation and the moment from which requests are counted."""


class Block(msgspec.Struct, frozen=True):
    """Requests to be sent to a router, or to engines themselves, each to the next in turn."""

    to: list[Address]
    model: str
    calls: list[Call]
    num_prefix: int
    vocab_size: int
    seed: str
    is_direct: bool = False
    """``to`` are engines."""
    num_at_once: int | None = None
    """So many clients for each receiver, that wait for their answers, instead of arrivals."""
    pids: dict[str, list[int]] = {}
    """Whose processor time is told, by kind."""
    url: str = ""
    """Of a frontend, that is asked over HTTP instead."""


class Met(msgspec.Struct, frozen=True, array_like=True):
    """What one request met; seconds since it was due. ``error`` stands for the rest where there is one."""

    late_s: float
    """How late it was sent."""
    ttft_s: float = 0.0
    jct_s: float = 0.0
    num_tokens: int = 0
    longest_gap_s: float = 0.0
    num_cached: int = 0
    """Prompt tokens that some cache had."""
    num_preemptions: int = 0
    error: str = ""


class Ran(msgspec.Struct, frozen=True):
    """A block that was run. ``cpu_s`` by kind, ``client`` among them."""

    seconds: float
    met: list[Met]
    cpu_s: dict[str, float]


class Door(Protocol):
    """Where a request is sent. What it yields is how many tokens came; usage follows in ``cost``."""

    cost: tuple[int, int]
    """Prompt tokens that were cached, and preemptions."""

    def tokens(self) -> AsyncIterator[int]: ...


class BusDoor:
    """A router, or an engine, over the bus."""

    def __init__(self, to: Ref, message: Generate | StartGenerate) -> None:
        self.cost = (0, 0)
        self._to = to
        self._message = message

    async def tokens(self) -> AsyncIterator[int]:
        async with self._to.stream(self._message, timeout=TIMEOUT_S) as tokens:
            async for token in tokens:
                if token.usage is not None:
                    self.cost = (token.usage.num_cached_tokens, token.usage.num_preemptions)
                yield 1


class Client:
    """Sends blocks."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._num_blocks = 0

    async def run(self, block: Block) -> Ran:
        """Send a block's requests and wait for the last answer."""
        self._num_blocks += 1
        requests, clock = self._requests(block), self._node.clock
        before = _cpu(block.pids)
        gc.collect()
        gc.disable()  # The client's pauses are nothing that a fleet does.
        begin = clock.now() + LEAD_S
        try:
            async with asyncio.TaskGroup() as group:
                if block.num_at_once is None:
                    for call, request in zip(block.calls, requests, strict=True):
                        due = begin + call.at_s
                        if (wait_s := due - clock.now()) > 0:
                            await clock.sleep(wait_s)
                        group.create_task(request.send(due))
                else:
                    for first in range(len(block.to)):
                        waiting = iter(requests[first :: len(block.to)])
                        for _ in range(block.num_at_once):
                            group.create_task(_send_in_turn(waiting))
        finally:
            gc.enable()
        seconds = clock.now() - begin
        after = _cpu(block.pids)
        return Ran(seconds, [each.met for each in requests], {kind: after[kind] - before[kind] for kind in after})

    def _requests(self, block: Block) -> list["Sending"]:
        prompts = draw_prompts(block.calls, block.num_prefix, block.vocab_size, block.seed)
        connections = Connections(block.url) if block.url else None
        requests = []
        for index, (call, prompt) in enumerate(zip(block.calls, prompts, strict=True)):
            sampling = SamplingParams(max_tokens=call.num_output, ignore_eos=True)
            request_id = f"{self._num_blocks}-{index}"
            door: Door
            if connections is not None:
                door = HttpDoor(connections, block.model, unpack_tokens(prompt), call.num_output)
            else:
                message: Any = Generate(request_id, block.model, prompt, sampling)
                if block.is_direct:
                    message = StartGenerate(request_id, 0, prompt, sampling)
                door = BusDoor(self._node.ref(block.to[index % len(block.to)]), message)
            requests.append(Sending(door, call.num_output, self._node.clock))
        return requests


class Sending:
    """One request, and what it met."""

    def __init__(self, door: Door, wanted: int, clock: Clock) -> None:
        self.met = Met(0.0, error="it was not sent")
        self._door = door
        self._wanted = wanted
        self._now = clock.now

    async def send(self, due: float | None = None) -> None:
        """Send it now, and read all that comes. It was due then, or is now."""
        sent = self._now()
        due = sent if due is None else due
        first = last = longest = 0.0
        count = 0
        try:
            async for more in self._door.tokens():
                now = self._now()
                if not count:
                    first = now
                elif now - last > longest:
                    longest = now - last
                last = now
                count += more
        except Exception as error:
            self.met = Met(sent - due, error=f"{type(error).__name__}: {error}"[:200])
            return
        if count != self._wanted:
            self.met = Met(sent - due, error=f"{count} tokens of {self._wanted} came")
            return
        self.met = Met(sent - due, first - due, last - due, count, longest, *self._door.cost)


async def _send_in_turn(waiting: Iterator[Sending]) -> None:
    for request in waiting:
        await request.send()


def _cpu(pids: dict[str, list[int]]) -> dict[str, float]:
    found = {kind: sum(map(cpu_seconds, some)) for kind, some in pids.items()}
    return {**found, "client": cpu_seconds(os.getpid())}


async def serve(folder: str) -> None:
    """Run blocks from standard input until it ends, or whoever started this."""
    die_with_parent()
    decode, encode = msgspec.json.Decoder(Block).decode, msgspec.json.Encoder().encode
    loop, reader = asyncio.get_running_loop(), asyncio.StreamReader(limit=1 << 26)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with Node("load", endpoint=f"ipc://{folder}/load.sock", fleet=FLEET) as node:
        client = Client(node)
        while line := await reader.readline():
            answer = encode(await client.run(decode(line)))
            os.write(1, answer + b"\n")


# ---- the other side ------------------------------------------------------------------------------------------------


class Load:
    """The client's process, as the one that measures sees it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def run(self, block: Block) -> Ran:
        """Have a block run. Raises RuntimeError if the process ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(block) + b"\n")
        await self._process.stdin.drain()
        line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError("the client's process ended")
        return msgspec.json.decode(line, type=Ran)


@asynccontextmanager
async def running_load(folder: Path) -> AsyncIterator[Load]:
    """Start the client's process, and end it."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "_strategies.load",
        str(folder),
        cwd=Path(__file__).parent.parent,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 26,
    )
    try:
        yield Load(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1]))
