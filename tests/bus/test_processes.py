"""Real processes that are killed, stopped and restarted while something is asked of them."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from callboard.bus import ActorDied, Address, Ask, LinkConfig, LinkLost, Message, Node, Stream

SERVER = """
import asyncio, sys, os
import uvloop
from collections.abc import AsyncIterator
from callboard.bus import Ask, Message, Node, Stream

class Pid(Message, frozen=True):
    pid: int
class GetPid(Ask[Pid], frozen=True):
    delay_s: float = 0.0
class Ticks(Stream[int], frozen=True):
    pass

class Server:
    async def on_get_pid(self, message: GetPid) -> Pid:
        await asyncio.sleep(message.delay_s)
        return Pid(os.getpid())
    async def on_ticks(self, message: Ticks) -> AsyncIterator[int]:
        for i in range(10**9):
            yield i
            await asyncio.sleep(0.001)

async def main():
    async with Node("server", endpoint=sys.argv[1]) as node:
        node.add("server", Server())
        print("ready", flush=True)
        await asyncio.Event().wait()

uvloop.run(main())
"""


class Pid(Message, frozen=True):
    pid: int


class GetPid(Ask[Pid], frozen=True):
    delay_s: float = 0.0


class Ticks(Stream[int], frozen=True):
    pass


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/server.sock"


@pytest.fixture
async def server(endpoint: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await spawn(endpoint)
    yield process
    if process.returncode is None:
        process.kill()
    await process.wait()


async def spawn(endpoint: str, script: str = SERVER) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, endpoint, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    async with asyncio.timeout(30):
        assert await process.stdout.readline() == b"ready\n"
    return process


async def test_a_killed_process_is_known_dead_and_its_successor_answers(
    endpoint: str, server: asyncio.subprocess.Process
) -> None:
    async with Node("client") as client:
        ref = client.ref(Address("server", endpoint, "server"))
        assert (await ref.ask(GetPid())).pid == server.pid
        pending = asyncio.ensure_future(ref.ask(GetPid(60)))
        async with ref.stream(Ticks()) as ticks:
            await anext(ticks)
            server.kill()
            with pytest.raises(ActorDied):
                async for _ in ticks:
                    pass
        with pytest.raises(ActorDied):
            await pending
        successor = await spawn(endpoint)
        try:
            assert (await ref.ask(GetPid())).pid == successor.pid
        finally:
            successor.kill()
            await successor.wait()


async def test_a_process_that_dialled_and_was_killed_is_known_dead(tmp_path: Path) -> None:
    dialler = f"""
import asyncio
from callboard.bus import Address, Message, Node, Stream

class Hold(Stream[int], frozen=True):
    pass

async def main():
    async with Node("dialler") as node:
        ref = node.ref(Address("keeper", "ipc://{tmp_path}/keeper.sock", "keeper"))
        async with ref.stream(Hold()) as items:
            async for _ in items:
                print("holding", flush=True)

asyncio.run(main())
"""
    ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    class Hold(Stream[int], frozen=True):
        pass

    class Keeper:
        async def on_hold(self, message: Hold) -> AsyncIterator[int]:
            from callboard.bus import current_call

            call = current_call()
            assert call is not None
            try:
                yield 1
                await asyncio.sleep(60)
            finally:
                ended.set_result(call.ended)

    async with Node("keeper", endpoint=f"ipc://{tmp_path}/keeper.sock") as node:
        Keeper.on_hold.__annotations__["message"] = Hold
        node.add("keeper", Keeper())
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", dialler, stdout=asyncio.subprocess.PIPE)
        assert process.stdout is not None
        async with asyncio.timeout(30):
            assert await process.stdout.readline() == b"holding\n"
            process.kill()
            assert await ended == "actor_died"
            await process.wait()


async def test_a_stopped_process_is_cut_off_by_pings(endpoint: str, server: asyncio.subprocess.Process) -> None:
    config = LinkConfig(ping_s=0.1, silent_s=0.5)
    async with Node("client", links=config) as client:
        ref = client.ref(Address("server", endpoint, "server"))
        await ref.ask(GetPid())
        os.kill(server.pid, signal.SIGSTOP)
        with pytest.raises(LinkLost, match="not been heard"):
            await ref.ask(GetPid())


async def test_a_process_whose_sockets_close_before_it_has_ended_is_known_dead(endpoint: str) -> None:
    dying = """
def die():
    os.closerange(3, 256)
    time.sleep(0.05)
    os._exit(0)
"""
    script = SERVER.replace("class Server:", f"import time{dying}class Server:").replace(
        'print("ready"', 'asyncio.get_running_loop().add_signal_handler(15, die); print("ready"'
    )
    process = await spawn(endpoint, script)
    async with Node("client") as client:
        ref = client.ref(Address("server", endpoint, "server"))
        await ref.ask(GetPid())
        pending = asyncio.ensure_future(ref.ask(GetPid(60)))
        await ref.ask(GetPid())
        process.terminate()
        with pytest.raises(ActorDied):
            await pending
    await process.wait()
