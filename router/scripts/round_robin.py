"""Each request to the next engine in turn, which computes and decodes all of it: data parallelism.

request ──> engine 0        start_generate
request ──────> engine 1    start_generate
request ──> engine 0        ...
"""

from itertools import count

from callboard.router import Fleet, Request, Tokens

turns = count()


async def route(request: Request, fleet: Fleet) -> Tokens:
    engines = fleet.engines
    async for token in engines[next(turns) % len(engines)].start_generate(request):
        yield token
