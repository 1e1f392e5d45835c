"""KV managers over real sockets and shared memory, and writers that are stopped and killed."""

import asyncio
import signal
import subprocess
import sys

import pytest
from waiting import PATIENCE_S

from callboard.actors.actor import start_actor, stop_actor
from callboard.actors.directory import Directory
from callboard.actors.kv_manager import KvManager
from callboard.actors.protocol import GetKvStats, ListEntries, PrepRecv, Release, RemoteSend
from callboard.bus import Node
from callboard.kv.layout import KvLayout
from callboard.kv.tokens import pack_tokens

LAYOUT = KvLayout(num_layers=2, num_kv_heads=1, head_dim=4, block_size=4)
PROMPT = list(range(10))

WRITER = """
import asyncio, sys
from callboard.actors.protocol import Tie
from callboard.actors.protocol import OpenWrite
from callboard.bus import FOREVER, Address, Node

async def main():
    endpoint, epoch, reservation_id = sys.argv[1:]
    async with Node("writer") as node:
        manager = node.ref(Address("d", endpoint, "d"))
        async with manager.stream(Tie(epoch), timeout=FOREVER) as items:
            print((await anext(items)).pool_path, flush=True)
            await manager.ask(OpenWrite(reservation_id, epoch, "w", 0, 10))
            print("writing", flush=True)
            await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.fixture
async def manager(tmp_path):
    async with Node("d", endpoint=f"ipc://{tmp_path}/d.sock") as node:
        config = KvManager.Config("d", LAYOUT, 8, socket_dir=str(tmp_path / "pools"))
        manager = KvManager(config)
        await start_actor(node, "d", manager)
        yield manager
        await stop_actor(manager)


@pytest.fixture
async def client():
    async with Node("client") as node:
        yield node


def start_writer(*arguments):
    return subprocess.Popen([sys.executable, "-c", WRITER, *arguments], stdout=subprocess.PIPE, text=True)


async def until(ask, holds):
    async with asyncio.timeout(PATIENCE_S):
        while not holds(stats := await ask()):
            await asyncio.sleep(0.01)
    assert stats.problems == ()


@pytest.mark.parametrize("is_stopped", [False, True])
async def test_a_killed_writer_frees_what_it_was_writing_and_a_stopped_one_does_not(manager, client, is_stopped):
    d = client.ref(manager.ref.address)
    kv = (await d.ask(PrepRecv("r", 0, pack_tokens(PROMPT)))).kv
    with start_writer(kv.manager.endpoint, kv.epoch, kv.reservation_id) as writer:
        try:
            await asyncio.to_thread(writer.stdout.readline)
            assert await asyncio.to_thread(writer.stdout.readline) == "writing\n"
            if is_stopped:
                writer.send_signal(signal.SIGSTOP)
            await d.ask(Release(kv))
            for _ in range(10):
                assert (await d.ask(GetKvStats())).quarantined == 3
        finally:
            writer.kill()
        await until(lambda: d.ask(GetKvStats()), lambda stats: stats.free == 8)


async def test_pages_go_through_shared_memory_between_two_managers(manager, client, tmp_path):
    async with Node("p", endpoint=f"ipc://{tmp_path}/p.sock") as node:
        sender = KvManager(KvManager.Config("p", LAYOUT, 8, socket_dir=str(tmp_path / "pools")))
        await start_actor(node, "p", sender)
        # A finished sequence of the sender's, whose full blocks are in its cache.
        sender.blocks.attach("e", "1")
        table = sender.blocks.admit("e", "s", pack_tokens(PROMPT)).block_table
        sender.store.view[:] = bytes(i % 251 for i in range(len(sender.store.view)))
        sender.blocks.finish("e", "s", pack_tokens(PROMPT), table)
        d, p = client.ref(manager.ref.address), client.ref(sender.ref.address)
        reserved = await d.ask(PrepRecv("r", 0, pack_tokens(PROMPT), 7))
        sent = await p.ask(RemoteSend("r", 0, pack_tokens(PROMPT), reserved.kv, 0, 7, "e"))
        assert (sent.lane, sent.num_bytes) == ("shm", 7 * LAYOUT.token_bytes)
        begin = reserved.kv.slots[0].slot
        for layer in range(2):
            for half in (0, 1):
                for i in range(7):
                    written = manager.store.slot(layer, half, begin + i)
                    assert written == sender.store.slot(layer, half, table[0] * 4 + i)
        await stop_actor(sender)


async def test_a_manager_is_in_the_directory_with_its_load(tmp_path):
    async with Node("all", endpoint=f"ipc://{tmp_path}/all.sock") as node:
        directory = await start_actor(node, "directory", Directory())
        manager = KvManager(KvManager.Config("d", LAYOUT, 8, device="cpu:0", socket_dir=str(tmp_path / "pools")))
        ref = await start_actor(node, "d", manager, directory=directory)
        await ref.ask(PrepRecv("r", 0, pack_tokens(PROMPT)))
        async with asyncio.timeout(PATIENCE_S):
            while True:
                entries = (await directory.ask(ListEntries())).entries
                if entries and entries[0].load.free_blocks == 5:
                    break
                await asyncio.sleep(0.01)
        (entry,) = entries
        assert (entry.name, entry.kind, entry.device) == ("d", "kv_manager", "cpu:0")
        assert entry.load.num_blocks == 8
        await stop_actor(manager)


async def test_a_manager_between_processes_needs_a_socket_directory(tmp_path):
    async with Node("d", endpoint=f"ipc://{tmp_path}/d.sock") as node:
        with pytest.raises(ValueError, match="needs a socket_dir"):
            await start_actor(node, "d", KvManager(KvManager.Config("d", LAYOUT, 8)))
