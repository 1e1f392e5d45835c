"""Two senders fill one reservation, half each, from two engines or from one and the receiver itself; some at once."""

import asyncio

from callboard.router import Fleet, Request, least_loaded


async def route(request: Request, fleet: Fleet):
    p, d = least_loaded(fleet.prefill), least_loaded(fleet.decode)
    middle = request.num_tokens // 2
    async with d.prep_recv(request) as kv:
        other = d if request.num_tokens % 2 else p
        if request.num_tokens % 3:
            await p.remote_send(request, kv, end=middle)
            await other.remote_send(request, kv, begin=middle)
        else:
            async with asyncio.TaskGroup() as group:
                group.create_task(p.remote_send(request, kv, end=middle))
                group.create_task(other.remote_send(request, kv, begin=middle))
        async for token in d.start_generate(request, begin=kv.end, kv=kv):
            yield token
