"""Holds a reservation for long, and asks for it again to renew its lease: its KV manager may be another one by then."""

import asyncio

from callboard.router import Fleet, Request, least_loaded


async def route(request: Request, fleet: Fleet):
    p, d = least_loaded(fleet.prefill), least_loaded(fleet.decode)
    async with d.prep_recv(request) as kv:
        for _ in range(request.num_tokens % 4):
            await asyncio.sleep(0.1)
            await d.prep_recv(request)
        await p.remote_send(request, kv)
        async for token in d.start_generate(request, begin=kv.end, kv=kv):
            yield token
