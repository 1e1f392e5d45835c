"""Hands the request over again and again; what cannot be moved goes on where it is."""

import asyncio

from callboard.bus import BusError
from callboard.router import Engine, Fleet, Request, least_loaded


async def route(request: Request, fleet: Fleet, *, inline: bool = True, first: int = 3, every: int = 5):
    here = least_loaded(fleet.engines)
    moving = None

    async def move(there: Engine) -> Engine:
        try:
            await here.hand_over(request, there)
        except BusError as error:
            request.note(stays=error)
            return here
        return there

    async for token in here.start_generate(request):
        yield token
        if token.position % every != first or token.finish_reason is not None:
            continue
        others = [engine for engine in fleet.engines if engine.name != here.name]
        if moving is not None and moving.done():
            here, moving = moving.result(), None
        if others and inline:
            here = await move(others[0])
        elif others and moving is None:
            moving = asyncio.ensure_future(move(others[0]))
