"""The lanes of production between two KV managers in processes of their own: ``shm``, and ``ucx`` over TCP.

The near manager's pool is the source. Before each job a prompt of as many blocks is put into its prefix cache; the job
is then a ``remote_send`` of it. Timed is the lane's part, ``Sent.send_s``: every page read from its place in one pool
and put into its place in the other. What the whole of ``remote_send`` takes is told beside it.
"""

import sys
import time

import uvloop
from _transfer_job import LAYOUT, NUM_BLOCKS, Job, Moved, Setup, follow_far_async, follow_near_async

from callboard.actors.actor import start_actor
from callboard.actors.kv_manager import KvManager
from callboard.actors.protocol import PrepRecv, Release, RemoteSend
from callboard.bus import Address, Node

from .cached_prompts import attached, new_prompt


def far(setup: Setup) -> None:
    uvloop.run(_far(setup))


async def _far(setup: Setup) -> None:
    async with Node("far", endpoint=f"ipc://{setup.folder}/far-{setup.side}") as node:
        manager = manager_of("d", setup, setup.target_fd)
        ref = await start_actor(node, "d", manager)
        async with attached(node, ref) as engine:
            await engine.scatter()
        await follow_far_async(ref.address.endpoint)


def near(setup: Setup) -> None:
    uvloop.run(_near(setup))


async def _near(setup: Setup) -> None:
    async with Node("near", endpoint=f"ipc://{setup.folder}/near-{setup.side}") as node:
        p = await start_actor(node, "p", manager_of("p", setup, setup.source_fd))
        d = node.ref(Address("far", setup.facts, "d"))
        async with attached(node, p) as engine:
            await engine.scatter()

            async def move(job: Job) -> Moved:
                prompt = new_prompt(job)
                table = await engine.compute(prompt)
                reserved = await d.ask(PrepRecv(f"{job.seed}", 0, prompt))
                cpu_s, begin = time.process_time(), time.perf_counter()
                sent = await p.ask(RemoteSend(f"{job.seed}", 0, prompt, reserved.kv, 0, None, engine.name), timeout=60)
                whole_s, cpu_s = time.perf_counter() - begin, time.process_time() - cpu_s
                if sent.lane != setup.side or sent.num_bytes != job.num_bytes:
                    sys.exit(f"{sent.num_bytes} bytes of {job.num_bytes} went over the lane {sent.lane}")
                blocks = [(run.slot + i) // LAYOUT.block_size for run in reserved.kv.slots for i in range(run.count)]
                await d.ask(Release(reserved.kv))
                return Moved(sent.send_s, cpu_s, (table, blocks[:: LAYOUT.block_size]), whole_s)

            await follow_near_async(move)


def manager_of(name: str, setup: Setup, fd: int) -> KvManager:
    """Return a KV manager of one of the pools."""
    folder = f"{setup.folder}/{setup.side}"
    transport = setup.side if setup.side in ("shm", "ucx") else "auto"
    return KvManager(
        KvManager.Config(name, LAYOUT, NUM_BLOCKS, pool_fd=fd, socket_dir=folder, transport=transport, lease_s=60.0)
    )
