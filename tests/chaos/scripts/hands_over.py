"""Every few tokens the sequence goes on at another engine; what keeps it from moving leaves it where it is."""

from callboard.bus import BusError
from callboard.router import Fleet, Request, least_loaded


async def route(request: Request, fleet: Fleet, *, every: int = 3):
    engines = fleet.decode
    here = least_loaded(engines)
    others = [engine for engine in engines if engine.name != here.name]
    num = 0
    async for token in here.start_generate(request):
        yield token
        num += 1
        if others and num % every == 0 and token.finish_reason is None:
            try:
                await here.hand_over(request, others[0])
                here, others[0] = others[0], here
            except BusError:
                others.append(others.pop(0))
