"""Hot prefixes are copied to engines that lack them before they are asked for there; requests go where it is quickest.

background   engine 0 ███ ── remote_send ──> engine 1 ███     once a second, for what many prompts begin with
request ───────────────────────────────────> engine 1         finds its prefix there, and the shorter queue
"""

from callboard.router import Fleet, Request, Tokens, background, cheapest, predict


@background(every=1.0)
async def replicate(fleet: Fleet, *, min_hits_per_s: float = 0.5) -> None:
    for prefix in await fleet.hot_prefixes(min_hits_per_s=min_hits_per_s):
        if prefix.holders and prefix.others:
            async with prefix.others[0].prep_recv(prefix) as kv:
                await prefix.holders[0].remote_send(prefix, kv)


async def route(request: Request, fleet: Fleet, *, min_hits_per_s: float = 0.5) -> Tokens:
    cached = await fleet.probe(request, only_if_seen=True)
    engine = cheapest(fleet.engines, lambda e: predict(request, e, e, cached=cached).jct)
    async for token in engine.start_generate(request):
        yield token
