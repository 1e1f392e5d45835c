"""An engine as a script sees it: the three verbs, typed, checked and recorded.

``prep_recv`` and ``remote_send`` go to the engine's KV manager, ``start_generate`` to the engine itself.
"""

from callboard.actors.move_protocol import Moved
from callboard.actors.protocol import Abort, Entry, Load, PrepRecv, RemoteSend, Sent, StartGenerate
from callboard.bus import Ref
from callboard.kv.layout import BadRange

from .attempt import Attempt
from .generation import Generation
from .handover import hand_over
from .known.transfers import Transfer
from .request import Request
from .reservation import PrepRecvCall, Reserved

LONGEST_WAIT_S = 30.0
"""The longest that a manager is asked to wait for free blocks."""
DEFAULT_BLOCK_SIZE = 16
NOTHING_SENT = Sent(0, "", 0, 0, 0.0, 0.0, 0.0, 0.0)


class Engine:
    """One engine, for one run of a script."""

    def __init__(self, entry: Entry, attempt: Attempt) -> None:
        self.entry = entry
        self._attempt = attempt

    @property
    def name(self) -> str:
        """The engine's name in the fleet."""
        return self.entry.name

    @property
    def roles(self) -> tuple[str, ...]:
        """What it is for; empty means everything."""
        return self.entry.roles

    @property
    def model(self) -> str:
        """The model it serves."""
        return self.entry.model

    @property
    def host(self) -> str:
        """The joined host it runs on; empty where the fleet was started."""
        return self.entry.host

    @property
    def block_size(self) -> int:
        """Tokens of a block: what is cached, is in whole ones."""
        return self.limit("block_size", default=DEFAULT_BLOCK_SIZE)

    def limit(self, name: str, *, default: int) -> int:
        """Return a number that the engine tells of itself (``max_num_batched_tokens``), else ``default``."""
        told = self.entry.detail.get(name, "")
        return max(1, int(told)) if told.isascii() and told.isdigit() else default

    @property
    def load(self) -> Load:
        """How busy it is, this router's own requests counted to this instant."""
        return self._attempt.loads.load(self.entry)

    @property
    def speed(self) -> Load:
        """The load of an engine whose steps take what this one's do: its own, or of one that has made steps already."""
        load = self.load
        if load.step_s:
            return load
        others = (entry.load for entry in self._attempt.shared.view.entries("engine") if entry.model == self.model)
        return next((other for other in others if other.step_s), load)

    @property
    def last_picked(self) -> int:
        """Larger the later this router picked the engine, 0 if never."""
        return self._attempt.loads.last_picked(self.name)

    def has_role(self, role: str) -> bool:
        """Return whether the engine takes that part; without explicit roles it takes every one."""
        return not self.roles or role in self.roles

    def pick(self) -> None:
        """Count the request as this engine's from now on, before the first verb."""
        self._attempt.pick(self.name)

    def prep_recv(self, request: Request, end: int | None = None) -> PrepRecvCall:
        """Match the prompt here and reserve blocks for what is missing of ``prompt[:end]``.

        ``kv = await e.prep_recv(request)``, or ``async with e.prep_recv(request) as kv:``, which releases at its end
        what no engine adopted. Raises BadRange, OutOfBlocks.
        """
        end_token = request.bound(end, default=request.num_tokens)
        self.pick()
        prompt, wait_s = request.packed_prompt, _wait_s(request)
        message = PrepRecv(request.id, request.attempt, prompt, end_token, wait_s, self.name)
        self._attempt.promise(self.name, end_token, request.num_tokens, is_decode=True)
        return PrepRecvCall(self.entry, self._attempt, message)

    async def remote_send(
        self, request: Request, kv: Reserved, begin: int | None = None, end: int | None = None
    ) -> Sent:
        """Compute what is lacking here of ``prompt[:end]`` and write ``[begin, end)`` into the reservation.

        By default all that the receiver lacks; what it has already (before ``kv.begin``) is not sent again, and for
        an empty range nothing is. Raises BadRange, StaleReservation, OutOfBlocks.
        """
        begin, end = request.bound(begin, default=kv.begin), request.bound(end, default=kv.end)
        if begin > end and begin > kv.begin:
            raise BadRange(begin=begin, end=end, num_tokens=request.num_tokens, reason="it ends before it begins")
        if end > kv.end:
            reason = f"the reservation ends at {kv.end}"
            raise BadRange(begin=begin, end=end, num_tokens=request.num_tokens, reason=reason)
        begin = max(begin, kv.begin)
        if begin >= end:
            self._attempt.unpick(self.name)
            return NOTHING_SENT
        prompt, wait_s = request.packed_prompt, _wait_s(request)
        message = RemoteSend(request.id, request.attempt, prompt, kv.addr, begin, end, self.name, wait_s)
        self.pick()
        self._attempt.promise(self.name, 0, end)
        with self._attempt.call("remote_send", self.entry) as span:
            sent = await self._attempt.manager_of(self.entry).ask(message, timeout=request.deadline)
            span.facts = {
                "num_bytes": sent.num_bytes,
                "lane": sent.lane,
                "num_computed_tokens": sent.num_computed_tokens,
                "num_reused_tokens": sent.num_reused_tokens,
            }
        seconds = self._attempt.node.clock.now() - span.start_s
        to, num_tokens = kv.addr.manager, end - begin
        self._attempt.shared.transfers.sent(self.entry.manager, to, sent, seconds=seconds, num_tokens=num_tokens)
        self._attempt.num_computed_tokens += sent.num_computed_tokens
        return sent

    def start_generate(self, request: Request, begin: int | None = None, kv: Reserved | None = None) -> Generation:
        """Adopt the reservation, compute the KV of ``prompt[begin:]`` (by default all it lacks), and decode."""
        begin_token = None if begin is None else request.bound(begin, default=0)
        self.pick()
        message = StartGenerate(
            request.id,
            request.attempt,
            request.packed_prompt,
            request.sampling,
            begin_token,
            None if kv is None else kv.addr,
            request.num_output_tokens,
        )
        has = 0 if kv is None else max(kv.begin, kv.end)
        self._attempt.promise(self.name, min(has, request.num_tokens - 1), request.num_tokens, is_decode=True)
        return Generation(self.entry, self._attempt, message)

    async def hand_over(self, request: Request, to: "Engine") -> Moved:
        """Have a running start_generate of this engine go on at another one, with its KV; whoever iterates it goes on.

        It goes on here until then, and stands still only while the last of its KV is on its way. Raises NotMovable,
        OutOfBlocks, or what else kept it from moving: then it goes on where it was.
        """
        return await hand_over(self._attempt, self.entry, to.entry)

    async def release(self, kv: Reserved) -> None:
        """Give a reservation back before its scope ends. A repeat does nothing."""
        await self._attempt.release(kv.addr)

    async def abort(self, request: Request) -> None:
        """End every sequence of this attempt of the request on this engine. A repeat does nothing."""
        await self.ref().ask(Abort(request.id, request.attempt), timeout=request.deadline)

    def transfer_from(self, sender: "Engine") -> Transfer:
        """Return what handing KV over from another engine takes, as measured, or as others' hand-overs let expect."""
        return self._attempt.shared.transfers.between(sender.entry.manager, self.entry.manager)

    def expected_tokens(self, request: Request) -> int:
        """Return how many tokens are likely still to be generated for a request, as answers of its model are."""
        sampling = request.sampling
        most = sampling.max_tokens - request.num_output_tokens
        return self._attempt.shared.lengths.expected(request.model, most=most, is_exact=sampling.ignore_eos)

    def ref(self) -> Ref:
        """Return the engine's ref."""
        return self._attempt.node.ref(self.entry.address)

    def __repr__(self) -> str:
        return f"Engine({self.name})"


def _wait_s(request: Request) -> float:
    return min(LONGEST_WAIT_S, request.deadline)
