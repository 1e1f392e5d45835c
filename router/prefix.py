"""A beginning that many prompts share, as a script sees it."""

from collections.abc import Callable

from callboard.actors.protocol import Generate, SamplingParams

from .engine import Engine
from .request import Request


class Prefix(Request):
    """A hot prefix, and who has it. It passes as a request in ``prep_recv`` and ``remote_send``.

    ``async with to.prep_recv(prefix) as kv: await prefix.holders[0].remote_send(prefix, kv)`` copies it: what was
    sent stays at its receiver as prefix cache.
    """

    def __init__(
        self,
        request_id: str,
        model: str,
        tokens: bytes,
        *,
        attempt: int,
        hits_per_s: float,
        holders: tuple[Engine, ...],
        others: tuple[Engine, ...],
        remaining_s: Callable[[], float],
    ) -> None:
        super().__init__(
            Generate(request_id, model, tokens, SamplingParams()), attempt=attempt, remaining_s=remaining_s
        )
        self.hits_per_s: float = hits_per_s
        """Requests of this router that begin with it, each second; the latest weigh most."""
        self.holders: tuple[Engine, ...] = holders
        """The ready engines that have all of it cached; there may be none."""
        self.others: tuple[Engine, ...] = others
        """The other ready engines of its model, the least loaded first."""

    def __repr__(self) -> str:
        return f"Prefix({self.num_tokens} tokens, {self.hits_per_s:.2g}/s, {len(self.holders)} holders)"
