"""A long prompt is computed by several engines, range by range: each computes its own behind what it was sent.

prompt   0 ──────── a ──────── b ──────── n
engine 0 [compute ) ── send [0, a) ──>
engine 1            [compute ) ── send [0, b), [0, a) while [a, b) is computed ──>
engine 2                       [compute ) and decode

One prompt is done no sooner, as each range needs all before it. But none blocks an engine for long, and several
prompts are in the chain at once, each at another engine.
"""

from callboard.router import Fleet, Request, Tokens


async def route(request: Request, fleet: Fleet, *, min_range: int = 256) -> Tokens:
    most = max(1, request.num_tokens // min_range)
    chain = fleet.idlest(min(most, len(fleet.engines)))
    ends = [request.num_tokens * (index + 1) // len(chain) for index in range(len(chain))]
    *senders, last = chain
    for sender, receiver, end in zip(senders, chain[1:-1], ends, strict=False):
        async with receiver.prep_recv(request, end=end) as kv:
            await sender.remote_send(request, kv)
    async with last.prep_recv(request, end=ends[-2] if senders else 0) as kv:
        if senders:
            await senders[-1].remote_send(request, kv)
        async for token in last.start_generate(request, begin=kv.end, kv=kv):
            yield token
