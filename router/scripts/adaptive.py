"""For each request the engines, and the split between them, that take the least time from all requests together.

By live load, prompt length, cached prefix, and what steps and transfers are measured to take (router/prediction.py).

prompt  0 ───────────────────────────── n      one engine does all of it
        P: remote_send ──── split ──> D        or P computes a part, or all of it, and D decodes
"""

from callboard.router import Fleet, Request, Tokens, best_plan


async def route(request: Request, fleet: Fleet, *, parts: int = 4) -> Tokens:
    cached = await fleet.probe(request, only_if_seen=True)
    plan = best_plan(request, fleet.prefill, fleet.decode, cached, parts=parts)
    p, d, split = plan.prefill, plan.decode, plan.split
    request.note(prefill=p.name, decode=d.name, split=split, ttft_s=plan.prediction.ttft, jct_s=plan.prediction.jct)
    if not split:
        async for token in d.start_generate(request):
            yield token
        return
    async with d.prep_recv(request, end=split) as kv:
        await p.remote_send(request, kv, begin=kv.begin, end=kv.end)
        async for token in d.start_generate(request, begin=kv.end, kv=kv):
            yield token
