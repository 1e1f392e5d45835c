"""The base of Callboard's actors: a lifetime, a node, and tasks that end with it.

The bus itself takes any object with ``on_*`` handlers; this class adds what a long-lived actor needs.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from callboard.bus import Node, Ref
from callboard.bus.tasks import Tasks


class Actor:
    """An actor with a start, an end, and owned tasks. ``node``, ``name`` and ``ref`` are set before ``start`` runs."""

    node: Node
    name: str
    ref: Ref
    directory: Ref | None
    """The fleet's directory, None outside of a fleet."""
    host: str = ""
    """The joined host it runs on, by its name in the fleet; empty where the fleet was started."""
    ask_to_kill: Callable[[str, str, str], None] | None = None
    """Asks the launcher to kill a node: its name, its incarnation, and why. A KV manager has it, in a process."""
    last_words: Callable[[str], None] | None = None
    """Tells the launcher why the process ends here and now. A router has it, in a process."""
    _tasks: Tasks

    async def start(self) -> None:
        """Get ready; the actor is on the bus already. An exception here ends the start."""

    async def stop(self) -> None:
        """Put things in order; called once at an orderly stop, before the actor's tasks are cancelled."""

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a task owned by the actor: cancelled when it stops; an exception in it is the actor's crash."""
        return self._tasks.spawn(coroutine)


async def start_actor(node: Node, name: str, actor: Actor, *, directory: Ref | None = None, host: str = "") -> Ref:
    """Put an actor on a node and start it; returns its ref. If the start fails, the actor is taken off again."""
    actor.node = node
    actor.name = name
    actor.directory = directory
    actor.host = host
    actor._tasks = Tasks(lambda error: node.crash(name, error))
    actor.ref = node.add(name, actor, after_crash=actor._tasks.cancel)
    try:
        await actor.start()
    except BaseException:
        node.remove(name)
        await actor._tasks.cancel()
        raise
    return actor.ref


async def stop_actor(actor: Actor) -> None:
    """Stop an actor in order and take it off its node."""
    try:
        await actor.stop()
    finally:
        actor.node.remove(actor.name)
        await actor._tasks.cancel()
