"""Generation is started while the KV is still on its way: the engine waits at its manager until it is sealed."""

import asyncio

from callboard.router import Fleet, Request, least_loaded


async def route(request: Request, fleet: Fleet):
    p, d = least_loaded(fleet.prefill), least_loaded(fleet.decode)
    async with d.prep_recv(request) as kv, asyncio.TaskGroup() as group:
        group.create_task(p.remote_send(request, kv))
        async for token in d.start_generate(request, kv=kv):
            yield token
