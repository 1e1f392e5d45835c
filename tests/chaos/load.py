"""The requests of a run: asked as clients do, each checked against what a simulated engine must answer."""

import asyncio
from dataclasses import dataclass, field
from random import Random

from callboard.actors.engine.simulated import Simulation, simulated_tokens
from callboard.actors.protocol import BadRequest, Generate, PrepRecv, Release, RemoteSend, Token
from callboard.bus import ActorDied, BusError, LinkLost, NotUnderstood, RemoteError
from callboard.kv.tokens import pack_tokens
from callboard.router import ScriptError

from .frontend_client import frontend_request
from .schedule import Asking
from .world import Machine, World, address_of

DEADLINE_S = 100.0
NEVER = (BadRequest, NotUnderstood, RemoteError, ScriptError)
"""What no fault may cause: a request here is a good one, and so is every script."""
MOST_HITS = 2
"""Deaths, one after another, that a request survives whatever it had: it may be the one that kills (recovery.py)."""
GONE = "What served this request is gone"
"""What the frontend says of such a death."""


@dataclass
class Request:
    """One request and what came of it."""

    asking: Asking
    expected: list[int]
    finish_reason: str
    state: str = "waiting"
    """waiting, asked, finished, failed, left (its client did, or died)"""
    tokens: list[int] = field(default_factory=list)
    error: Exception | None = None
    num_hits_before: int = 0
    """What had struck the fleet when it was asked."""
    ended_s: float = 0.0
    is_lost: bool = False
    is_repeated: bool = False

    @property
    def is_over(self) -> bool:
        return self.state in ("finished", "failed", "left")


class Load:
    """All requests of a run."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.requests: list[Request] = []

    def start(self, asking: Asking) -> Request:
        """Ask in the client's process, when it is time."""
        world = self.world
        expected, reason = _expected(asking, world.schedule.engine["simulated"], self._max_model_len())
        request = Request(asking, expected, reason)
        self.requests.append(request)
        machine = world.machines[asking.client]
        # A client that is killed has left; what became of its requests nobody can see.
        machine.process.on_kill.append(lambda: self._end(request, "left") if not request.is_over else None)
        machine.process.spawn(self._run(request, machine))
        return request

    @property
    def pending(self) -> list[Request]:
        """Requests that have not ended."""
        return [request for request in self.requests if not request.is_over]

    @property
    def is_over(self) -> bool:
        return not self.pending

    def _max_model_len(self) -> int:
        schedule = self.world.schedule
        return min(schedule.engine["simulated"].max_model_len, schedule.num_blocks * schedule.engine["block_size"])

    async def _run(self, request: Request, machine: Machine) -> None:
        asking = request.asking
        await asyncio.sleep(asking.at_s)
        request.state, request.num_hits_before = "asked", self.world.num_hits
        try:
            if asking.frontend_seed is not None:
                await self._run_frontend(request, asking.frontend_seed, machine)
                return
            async with asyncio.timeout(asking.leaves_after_s):
                await self._read(request, machine)
        except TimeoutError as error:
            has_left = asking.leaves_after_s is not None and type(error) is TimeoutError
            request.error = error
            self._end(request, "left" if has_left else "failed")
        except BusError as error:
            request.error = error
            self._end(request, "failed")
        except Exception as error:
            self.world.problem(f"request {asking.request_id} raised {error!r}")
            self._end(request, "failed")

    async def _run_frontend(self, request: Request, seed: int, machine: Machine) -> None:
        """Ask through the frontend's endpoints, and take over what their client says."""
        assert machine.node is not None
        answered = await frontend_request(
            machine.node,
            lambda: machine.ref_to(address_of("control", "main")),
            self.world.schedule.engine["simulated"],
            Random(seed),
            request_id=request.asking.request_id,
            max_model_len=self._max_model_len(),
        )
        for problem in answered.problems:
            is_repeated = any(word in problem for word in ("after its end", "after the end", "twice", "[DONE]"))
            self._wrong(request, problem, is_lost=not is_repeated, is_repeated=is_repeated)
        if answered.error:
            request.error = RuntimeError(answered.error)
        self._end(request, answered.state)

    async def _read(self, request: Request, machine: Machine) -> None:
        asking = request.asking
        message = Generate(asking.request_id, "tiny", pack_tokens(list(asking.prompt)), asking.sampling)
        router = machine.ref_to(address_of("control", "main"))
        process = machine.process
        async with router.stream(message, timeout=DEADLINE_S, credit=asking.credit) as tokens:
            async for token in tokens:
                if process.is_killed:
                    return  # In this very step.
                self._take(request, token)
                if asking.leaves_at_token is not None and len(request.tokens) >= asking.leaves_at_token:
                    self._end(request, "left")
                    return
                if asking.seconds_per_token:
                    await asyncio.sleep(asking.seconds_per_token)
        if request.state != "finished":
            self._wrong(request, "its stream ended without a last token", is_lost=True)
            self._end(request, "failed")

    def _take(self, request: Request, token: Token) -> None:
        position, expected = len(request.tokens), request.expected
        if request.is_over:
            self._wrong(request, f"token {token.position} came after its end", is_repeated=True)
        elif token.position < position:
            self._wrong(request, f"token {token.position} came again", is_repeated=True)
        elif token.position > position:
            self._wrong(request, f"token {token.position} came where {position} was due", is_lost=True)
        elif position >= len(expected) or token.id != expected[position]:
            wanted = expected[position] if position < len(expected) else "none"
            self._wrong(request, f"token {position} is {token.id} and not {wanted}", is_lost=True)
        request.tokens.append(token.id)
        if token.finish_reason is not None and not request.is_over:
            if token.finish_reason == "abort" and not self.world.is_calm:
                # A reader so slow that its engine gave up: the end of a stall, told as one.
                self._end(request, "failed")
                return
            if len(request.tokens) < len(expected) or token.finish_reason != request.finish_reason:
                self._wrong(
                    request, f"it ended after {len(request.tokens)} tokens ({token.finish_reason})", is_lost=True
                )
            usage = token.usage
            if usage is None or not 0 <= usage.num_cached_tokens <= len(request.asking.prompt):
                self._wrong(request, f"its usage is {usage}")
            self._end(request, "finished")

    def _end(self, request: Request, state: str) -> None:
        request.state = state
        request.ended_s = asyncio.get_running_loop().time()
        why = "" if request.error is None else f": {request.error!r}"
        self.world.note(f"{request.asking.request_id} {state} after {len(request.tokens)} tokens{why}")
        if isinstance(request.error, NEVER):
            self._wrong(request, f"no fault may cause {request.error!r}")
        elif state == "failed" and self.world.is_calm and not self._was_hit_too_often(request):
            self._wrong(request, f"it failed without a fault: {request.error!r}")

    def _was_hit_too_often(self, request: Request) -> bool:
        """Return whether it ended by the last of as many deaths as end any request."""
        is_death = isinstance(request.error, ActorDied | LinkLost) or GONE in str(request.error)
        return is_death and self.world.num_hits - request.num_hits_before > MOST_HITS

    def _wrong(self, request: Request, what: str, *, is_lost: bool = False, is_repeated: bool = False) -> None:
        request.is_lost |= is_lost
        request.is_repeated |= is_repeated
        self.world.problem(f"request {request.asking.request_id}: {what}")


async def send_everywhere(world: World) -> None:
    """Have each manager send some KV to each other one: they hear of each other, and all ways are open."""
    machine = world.machines["client"]
    engine_of = {manager: engine for engine, manager in world.schedule.managers.items()}
    for sender, engine in engine_of.items():
        for receiver in engine_of:
            if sender == receiver:
                continue
            prompt = pack_tokens([5, 6, 7])
            name = f"from {sender} to {receiver}"
            try:
                at = machine.ref_to(address_of(receiver, receiver))
                kv = (await at.ask(PrepRecv(name, 0, prompt, None, 10.0))).kv
                message = RemoteSend(name, 0, prompt, kv, kv.begin, kv.end, engine, 10.0)
                await machine.ref_to(address_of(sender, sender)).ask(message)
                await at.ask(Release(kv))
            except BusError as error:
                world.problem(f"sending {name} failed although all is well: {error!r}")


def _expected(asking: Asking, simulation: Simulation, max_model_len: int) -> tuple[list[int], str]:
    """Return the tokens a request must bring, and its finish reason."""
    sampling = asking.sampling
    most = min(sampling.max_tokens, max_model_len - len(asking.prompt))
    tokens = simulated_tokens(asking.prompt, most, simulation, sampling)
    if simulation.eos_token_id in tokens and not sampling.ignore_eos:
        return tokens[: tokens.index(simulation.eos_token_id) + 1], "stop"
    return tokens, "length"
