"""Each request to the engine with the fewest requests, which computes and decodes all of it.

request ──> the idlest engine    start_generate
"""

from callboard.router import Fleet, Request, Tokens, least_loaded


async def route(request: Request, fleet: Fleet) -> Tokens:
    async for token in least_loaded(fleet.engines).start_generate(request):
        yield token
