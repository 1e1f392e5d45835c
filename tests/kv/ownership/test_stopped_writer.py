"""A process that is stopped in the middle of a copy into a pool, past its lease, and goes on: SIGSTOP and SIGCONT."""

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

from waiting import PATIENCE_S

from callboard.actors.actor import start_actor, stop_actor
from callboard.actors.kv_manager import KvManager
from callboard.actors.protocol import GetKvStats, PrepRecv
from callboard.bus import LinkConfig, Node
from callboard.kv.layout import KvLayout
from callboard.kv.tokens import pack_tokens

LAYOUT = KvLayout(num_layers=2, num_kv_heads=1, head_dim=4, block_size=4)
PROMPT = list(range(10))

WRITER = """
import asyncio, sys
from callboard.actors.protocol import CloseWrite, OpenWrite, Tie
from callboard.bus import FOREVER, Address, BusError, Node
from callboard.kv.lanes import open_pool

async def main():
    endpoint, epoch, reservation_id = sys.argv[1:]
    async with Node("writer") as node:
        manager = node.ref(Address("d", endpoint, "d"))
        async with manager.stream(Tie(epoch), timeout=FOREVER) as items:
            tied = await anext(items)
            opened = await manager.ask(OpenWrite(reservation_id, epoch, "w", 0, 10))
            store = await open_pool(tied.pool_path, None)
            (run,) = opened.slots
            for i in range(1000):
                store.slot(1, 1, run.slot + i % run.count)[:] = bytes([i % 250 + 1]) * 16
                if i == 20:
                    print("half", flush=True)
                    sys.stdin.readline()
            print("written", flush=True)
    async with Node("writer-again") as node:  # Its old link has been given up: the end is told over another.
        try:
            await node.ref(Address("d", endpoint, "d")).ask(CloseWrite(reservation_id, epoch, "w", True))
        except BusError as error:
            print(type(error).__name__, flush=True)

asyncio.run(main())
"""


def start_writer(*arguments: str) -> "subprocess.Popen[str]":
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", WRITER, *arguments], stdin=pipe, stdout=pipe, text=True)


async def test_what_a_stopped_writer_may_write_is_nobodys_until_it_has_said_that_it_is_over(tmp_path: Path) -> None:
    links = LinkConfig(ping_s=0.1, silent_s=0.5)
    async with (
        asyncio.timeout(PATIENCE_S),
        Node("d", endpoint=f"ipc://{tmp_path}/d.sock", links=links) as node,
        Node("client") as client,
    ):
        manager = KvManager(KvManager.Config("d", LAYOUT, 8, socket_dir=str(tmp_path / "pools")))
        await start_actor(node, "d", manager)
        d = client.ref(manager.ref.address)
        kv = (await d.ask(PrepRecv("r", 0, pack_tokens(PROMPT)))).kv
        arguments = (kv.manager.endpoint, kv.epoch, kv.reservation_id)
        with start_writer(*arguments) as writer:
            try:
                assert writer.stdin is not None
                assert writer.stdout is not None
                assert await asyncio.to_thread(writer.stdout.readline) == "half\n"
                writer.send_signal(signal.SIGSTOP)
                while (await d.ask(GetKvStats())).quarantined != 3:
                    manager.blocks.reservations.expire(float("inf"))  # Renewed until its link is given up.
                    await asyncio.sleep(0.02)
                # Whoever needs blocks gets the others, and writes into them.
                manager.blocks.attach("e", "1")
                table = manager.blocks.admit("e", "s", pack_tokens(range(50, 70))).block_table
                for block in table:
                    manager.store.page(1, 1, block)[:] = b"\xee" * len(manager.store.page(1, 1, block))
                before = bytes(manager.store.slot(1, 1, kv.slots[0].slot))
                writer.stdin.write("\n")
                writer.stdin.flush()
                writer.send_signal(signal.SIGCONT)
                assert await asyncio.to_thread(writer.stdout.readline) == "written\n"
                assert await asyncio.to_thread(writer.stdout.readline) == "StaleReservation\n"
                assert bytes(manager.store.slot(1, 1, kv.slots[0].slot)) != before, "it did not go on"
                assert all(set(manager.store.page(1, 1, block)) == {0xEE} for block in table)
                stats = await d.ask(GetKvStats())
                assert (stats.quarantined, stats.free, stats.problems) == (0, 3, ())
            finally:
                writer.kill()
        await stop_actor(manager)
