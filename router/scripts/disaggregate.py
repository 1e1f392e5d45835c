"""P computes the prompt and sends its KV, D decodes: any number of prefill and of decode engines.

prompt  0 ─────────────────────────────── n
        P: remote_send [begin, n) ───────> D: start_generate
"""

from callboard.router import Fleet, Request, Tokens, least_loaded


async def route(request: Request, fleet: Fleet) -> Tokens:
    p, d = least_loaded(fleet.prefill), least_loaded(fleet.decode)
    async with d.prep_recv(request) as kv:
        await p.remote_send(request, kv)
        async for token in d.start_generate(request, begin=kv.end, kv=kv):
            yield token
