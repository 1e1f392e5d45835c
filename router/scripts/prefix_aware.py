"""Each request to the engine that is likely to be done with it first: its cached prefix weighed against its load.

request ──> engine 0    ████████░░  much of the prompt is cached, a short queue: this one
       ╌╌╌> engine 1    ██████████  all of it is cached, a long queue
       ╌╌╌> engine 2    ░░░░░░░░░░  idle, but all of it would have to be computed
"""

from callboard.router import Fleet, Request, Tokens, cheapest, predict


async def route(request: Request, fleet: Fleet) -> Tokens:
    cached = await fleet.probe(request, only_if_seen=True)
    engine = cheapest(fleet.engines, lambda e: predict(request, e, e, cached=cached).jct)
    request.note(num_cached_tokens=cached.get(engine, 0))
    async for token in engine.start_generate(request):
        yield token
