"""The node that is fuzzed over ZeroMQ: a process with real actors, which says how it is when asked."""

import asyncio
import gc
import logging
import os
import sys

import uvloop

from callboard.actors.actor import start_actor
from callboard.actors.directory import Directory
from callboard.actors.engine.engine import Engine
from callboard.actors.kv_manager import KvManager
from callboard.bus import Ask, Message, Node
from callboard.router.actor import RouterActor

from .in_process import Alarm, Parrot, census, rss_mib
from .recorder import LAYOUT, NUM_BLOCKS

CRASHED = 3


class Health(Message, frozen=True):
    census: tuple[int, ...]
    num_refused: int
    rss_mib: float
    num_lines: int
    problems: tuple[str, ...]
    """Errors logged, and exceptions that nobody caught."""


class HowAreYou(Ask[Health], frozen=True):
    pass


class Doctor:
    def __init__(self, node: Node, alarm: Alarm) -> None:
        self._node = node
        self._alarm = alarm

    def on_how_are_you(self, message: HowAreYou) -> Health:
        node = self._node
        gc.collect()
        num_refused = node._links.num_refused + node._server.num_refused
        alarm = self._alarm
        return Health(census(node, ()), num_refused, rss_mib(), alarm.num_lines, tuple(alarm.problems[:3]))


async def main(directory: str) -> None:
    """Serve until stdin ends. A crashed actor ends the process with CRASHED."""
    alarm = Alarm()
    logging.getLogger("callboard").addHandler(alarm)
    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: alarm.problems.append(f"{context.get('message')}: {context.get('exception')!r}")
    )
    async with Node("served", endpoint=f"ipc://{directory}/served.sock", fleet="test", on_crash=_on_crash) as node:
        ref = await start_actor(node, "directory", Directory())
        for name in ("p", "d"):
            config = KvManager.Config(
                name=f"kv-{name}",
                layout=LAYOUT,
                num_blocks=NUM_BLOCKS,
                lease_s=1.0,
                socket_dir=directory,
                fingerprint="tiny",  # Else it is that of whoever attaches itself first.
            )
            manager = await start_actor(node, f"kv-{name}", KvManager(config), directory=ref)
            await start_actor(
                node,
                name,
                Engine(
                    Engine.Config(
                        name=name, model="tiny", fingerprint="tiny", manager=manager.address, runner="simulated"
                    )
                ),
                directory=ref,
            )
        await start_actor(
            node, "main", RouterActor(RouterActor.Config(name="main", script="disaggregate")), directory=ref
        )
        node.add("parrot", Parrot())
        node.add("doctor", Doctor(node, alarm))
        print("ready", flush=True)
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(sys.stdin.fileno(), ended.set)
        await ended.wait()
        # Not in order: what was begun for peers that are gone may take minutes to end.
        os._exit(0)


def _on_crash(name: str, error: BaseException) -> None:
    print(f"actor {name} crashed: {error!r}", file=sys.stderr, flush=True)
    os._exit(CRASHED)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
