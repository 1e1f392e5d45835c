"""Two senders fill one reservation, half each, from two engines or from one and the receiver itself."""

from callboard.router import Fleet, Request, least_loaded


async def route(request: Request, fleet: Fleet):
    p, d = least_loaded(fleet.prefill), least_loaded(fleet.decode)
    middle = request.num_tokens // 2
    async with d.prep_recv(request) as kv:
        await p.remote_send(request, kv, end=middle)
        await (d if request.num_tokens % 2 else p).remote_send(request, kv, begin=middle)
        async for token in d.start_generate(request, begin=kv.end, kv=kv):
            yield token
