"""Changing scripts in the tests' fleet: several routers on nodes of their own, and somebody who changes them."""

from itertools import count
from typing import Any

from callboard.actors.protocol import Generate, SamplingParams
from callboard.actors.route_protocol import GetRoutes, Routes, ScriptText
from callboard.bus import Node
from callboard.kv.tokens import pack_tokens
from callboard.router.actor import RouterActor
from callboard.router.swap.changer import Changer
from callboard.router.swap.swap import Swapped, Target, swap

HEAD = "import asyncio\nfrom callboard.router import *\n\n"
LINE_OF_BODY = HEAD.count("\n") + 1
TO = """
async def route(request, fleet):
    async for token in least_loaded([e for e in fleet.engines if e.name == "{name}"]).start_generate(request):
        yield token
"""
"""Every request to one engine."""
FAILING = """
async def route(request, fleet):
    raise KeyError("planted")
    yield
"""

_ids = count(1)


def text_of(body: str, name: str = "mine", **options: Any) -> ScriptText:
    return ScriptText(name, f"/home/me/{name}.py", HEAD + body, options)


def to(engine: str) -> ScriptText:
    return text_of(TO.format(name=engine), f"to_{engine}")


def changer(by: str = "me", names: tuple[str, ...] = ()) -> Changer:
    return Changer(lambda: f"change-{next(_ids)}", by, 1000.0, names)


async def add_router(fleet: Any, name: str, script: str, node: str = "", **config: Any) -> RouterActor:
    """Start one more router, on a node of its own unless one is named."""
    at = fleet.nodes.get(node or f"node-{name}") or await fleet.node(node or f"node-{name}")
    router = RouterActor(RouterActor.Config(name=name, script=script, **config))
    await fleet.start(at, name, router, fleet.directory)
    await router.view.wait_for(lambda view: all(any(e.name == each for e in view.entries) for each in fleet.engines))
    return router


async def visitor(fleet: Any) -> Node:
    """Return the node of somebody who changes scripts."""
    name = f"visitor-{next(_ids)}"
    return await fleet.node(name)


def targets(node: Node, *routers: RouterActor) -> list[Target]:
    return [Target(each.routes.router, node.ref(each.ref.address)) for each in routers]


async def change(fleet: Any, decide: Any, *routers: RouterActor) -> Swapped:
    """Swap the script of routers, by default of the fleet's one."""
    node = await visitor(fleet)
    return await swap(node, targets(node, *(routers or (fleet.router,))), decide)


async def set_script(fleet: Any, text: ScriptText, *routers: RouterActor, **more: Any) -> Swapped:
    return await change(fleet, changer().set_script(text, **more), *routers)


async def look(fleet: Any, router: RouterActor | None = None) -> Routes:
    return await (router or fleet.router).ref.ask(GetRoutes(with_sources=True))


async def ask(router: RouterActor, request_id: str, max_tokens: int = 2) -> list[int]:
    """Return the tokens of a request to one router."""
    message = Generate(request_id, "m", pack_tokens(range(40)), SamplingParams(max_tokens=max_tokens))
    async with router.ref.stream(message) as tokens:
        return [token.id async for token in tokens]


def served(fleet: Any) -> dict[str, list[str]]:
    """Return which requests each engine was asked for."""
    return {
        name: [call[1] for call in engine.calls if call[0] == "start_generate"]
        for name, engine in fleet.engines.items()
    }
