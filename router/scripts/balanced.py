"""P computes ``[0, split)``, D computes ``[split, n)`` and decodes: ``ratio`` is D's share of the prompt.

prompt  0 ──────────────── split ──────── n
        P: remote_send ──> D: start_generate
"""

from callboard.router import Fleet, Request, Tokens, least_loaded


async def route(request: Request, fleet: Fleet, *, ratio: float = 0.2) -> Tokens:
    split = max(0, request.num_tokens - max(1, round(ratio * request.num_tokens)))
    p, d = least_loaded(fleet.prefill), least_loaded(fleet.decode)
    async with d.prep_recv(request, end=split) as kv:
        await p.remote_send(request, kv, begin=kv.begin, end=kv.end)
        async for token in d.start_generate(request, begin=kv.end, kv=kv):
            yield token
