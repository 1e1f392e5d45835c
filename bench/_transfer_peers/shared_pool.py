"""No lane at all: two engines on one KV manager, of which one has a prompt's KV and the other takes it over.

The manager is the far end, router and engines are the near one. Timed are the messages of the hand-off: ``prep_recv``,
``remote_send`` (which finds nothing to send) and the other engine's ``Admit``.
"""

import sys
import time

import uvloop
from _transfer_job import Job, Moved, Setup, follow_far_async, follow_near_async

from callboard.actors.actor import start_actor
from callboard.actors.protocol import PrepRecv, RemoteSend
from callboard.bus import Address, Node

from .cached_prompts import attached, new_prompt
from .kv_managers import manager_of


def far(setup: Setup) -> None:
    uvloop.run(_far(setup))


async def _far(setup: Setup) -> None:
    async with Node("far", endpoint=f"ipc://{setup.folder}/far-shared") as node:
        ref = await start_actor(node, "m", manager_of("m", setup, setup.source_fd))
        async with attached(node, ref) as engine:
            await engine.scatter()
        await follow_far_async(ref.address.endpoint)


def near(setup: Setup) -> None:
    uvloop.run(_near(setup))


async def _near(setup: Setup) -> None:
    async with Node("near") as node:
        manager = node.ref(Address("far", setup.facts, "m"))
        async with attached(node, manager, "prefill") as prefill, attached(node, manager, "decode") as decode:

            async def move(job: Job) -> Moved:
                prompt = new_prompt(job)
                table = await prefill.compute(prompt)
                name = f"{job.seed}"
                cpu_s, begin = time.process_time(), time.perf_counter()
                reserved = await manager.ask(PrepRecv(name, 0, prompt, engine="decode"))
                sent = await manager.ask(RemoteSend(name, 0, prompt, reserved.kv, reserved.begin, None, "prefill"))
                adopted = await decode.admit(prompt, name, reserved.kv)
                seconds, cpu_s = time.perf_counter() - begin, time.process_time() - cpu_s
                decode.finish(prompt, name, adopted)
                if adopted != table:
                    sys.exit("the decode engine was given other blocks than those that were computed")
                return Moved(seconds, cpu_s, (table, adopted), seconds, sent.num_bytes)

            await follow_near_async(move)
