"""A stream an engine is answering: its sequence, what is ready to be read, and what it has cost so far."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from callboard.actors.protocol import BadRequest, FinishReason, KvComputed, LayersDone, Token, Usage
from callboard.bus import BusError, Call, Node

from .phases import Phases
from .sequence import Sequence
from .step import Sample

Item = Token | LayersDone | KvComputed


class Generation:
    """A sequence and its reader. ``now`` is the node's clock everywhere; the buffer is the reader's to empty.

    ``call`` is the stream it answers.
    """

    def __init__(self, sequence: Sequence, call: Call, node: Node, *, now: float) -> None:
        self.sequence = sequence
        self.call = call
        self.phases = Phases(node, call)
        self.needs_admission = True
        """It has no blocks: at first, and again after a preemption."""
        self.read_s = now
        """When something was read last, or nothing was there to be read."""
        self.attempt = 0
        """Which attempt at the request asks for it."""
        self.has_place = False
        """It counts among the sequences that the engine runs at once."""
        self.is_watched = False
        """Somebody watches whether it is read at all."""
        self._scope: asyncio.Timeout | None = None
        self._items: deque[Item] = deque()
        self._error: BusError | None = None
        self._ready = asyncio.Event()
        self._is_closed = False
        self._is_aborted = False
        self.has_departed = False
        """Its reader has it from another engine now."""
        self._num_noted_prompt_tokens = self._num_noted_tokens = 0
        """Of the phases that are over."""
        self._begin_s = now
        self._start_s: float | None = None
        self._first_token_s: float | None = None

    @property
    def request_id(self) -> str:
        """The request it is for, as its router knows it."""
        return self.call.request_id or self.sequence.request_id

    # ---- the reader's side ---------------------------------------------------------------------------------------

    async def read(self) -> Item | None:
        """Wait for the next item. None: see whether it has departed, or needs admission, and read again.

        Raises what ended the sequence badly.
        """
        if not self._items:
            if self._error is not None:
                raise self._error
            if not self.needs_admission and not self.has_departed:
                self._ready.clear()
                await self._ready.wait()
        return self._items.popleft() if self._items else None

    @asynccontextmanager
    async def interruptible(self) -> AsyncIterator[None]:
        """Run the body unless ``fail`` is called meanwhile; then raise that error."""
        try:
            async with asyncio.timeout(None) as self._scope:
                if self._error is not None:
                    raise self._error
                yield
        except TimeoutError:
            if self._error is None:
                raise
            raise self._error from None
        finally:
            self._scope = None

    # ---- the engine's side ---------------------------------------------------------------------------------------

    @property
    def num_unread(self) -> int:
        """Items that wait to be read."""
        return len(self._items)

    @property
    def outcome(self) -> str:
        """How a stream that is over has ended: stop or length, abort (its reader left, or asked for it), or error.

        Or moved: its reader has left one that was held, and so goes on elsewhere.
        """
        is_left = self.call.ended in ("cancelled", "actor_died", "link_lost")
        if self.has_departed or (is_left and self.sequence.is_held):
            return "moved"
        return self.sequence.finish_reason or ("abort" if self._is_aborted or is_left else "error")

    def started(self, now: float) -> None:
        """Note that a step with it begins."""
        if self._start_s is None:
            self._start_s = now
        if self.phases.name == "queue":
            self.phases.enter("compute" if self.sequence.is_kv_only else "prefill", now)

    def admitted(self, now: float) -> None:
        """Note that it has blocks, and waits for its next step."""
        self.needs_admission = False
        self.phases.enter("queue", now)

    def paused(self, now: float) -> None:
        """Note that it is in no step any more, because too much of it is unread."""
        self._leave_phase("paused", now)

    def held(self, now: float) -> None:
        """Note that it is in no step any more, because it may go on elsewhere."""
        self._leave_phase("held", now)

    def resumed(self, now: float) -> None:
        """Note that it is in steps again."""
        if self.phases.name in ("paused", "held"):
            self.phases.enter("decode", now)

    def left(self, now: float) -> None:
        """Note that nobody reads it any more."""
        self._leave_phase("", now)

    def _leave_phase(self, name: str, now: float) -> None:
        sequence, facts = self.sequence, {}
        match self.phases.name:
            case "prefill" | "compute":
                facts = {
                    "num_tokens": sequence.num_written_prompt_tokens - self._num_noted_prompt_tokens,
                    "num_cached_tokens": sequence.num_reused_tokens or 0,
                }
                self._num_noted_prompt_tokens = sequence.num_written_prompt_tokens
                self._num_noted_tokens = sequence.num_output_tokens
            case "decode":
                num_tokens = sequence.num_output_tokens - self._num_noted_tokens
                facts = {"num_tokens": num_tokens, "num_preemptions": sequence.num_preemptions}
                self._num_noted_tokens = sequence.num_output_tokens
        self.phases.enter(name, now, **facts)

    def put(self, item: Item, now: float) -> None:
        """Leave an item for the reader."""
        if not self._is_closed:
            if not self._items:
                self.read_s = now
            self._items.append(item)
            self._ready.set()

    def emit(self, sample: Sample, position: int, finish_reason: FinishReason | None, now: float) -> None:
        """Leave a token; the last one carries the bill."""
        if self._first_token_s is None:
            self._first_token_s = now
        if finish_reason is not None:
            self._leave_phase("handover", now)
        elif self.phases.name == "prefill":
            self._leave_phase("decode", now)
        usage = None if finish_reason is None else self.usage(now)
        self.put(Token(position, sample.token, sample.logprob, finish_reason, usage), now)

    def computed(self, now: float) -> None:
        """Leave the last item of kv-only work."""
        start_s = now if self._start_s is None else self._start_s
        num_tokens = self.sequence.num_written_prompt_tokens
        self._leave_phase("handover", now)
        self.put(KvComputed(num_tokens, start_s - self._begin_s, now - start_s), now)

    def preempted(self, now: float) -> None:
        """Send the reader back to admission."""
        self._leave_phase("", now)
        self.needs_admission = True
        self._ready.set()

    def depart(self) -> None:
        """End without a word: its reader goes on elsewhere. A repeat does nothing."""
        if not self._is_closed:
            self.has_departed = self._is_closed = True
            self._items.clear()
            self._ready.set()

    def fail(self, error: BusError) -> None:
        """End with an error, after what is there already. The first error stays."""
        if self._error is None and not self._is_closed:
            self._error = error
            self._is_closed = True
            self._ready.set()
            if self._scope is not None:
                self._scope.reschedule(0.0)

    def abort(self, now: float) -> None:
        """End early: the last token that is still here says so, or a refusal where none is."""
        if self._is_closed:
            return
        self._is_aborted = True
        last = self._items[-1] if self._items else None
        if isinstance(last, Token) and last.finish_reason is None:
            self._items[-1] = msgspec.structs.replace(last, finish_reason="abort", usage=self.usage(now))
            self._is_closed = True
        else:
            self.fail(BadRequest(reason=f"request {self.sequence.request_id} was aborted"))

    def usage(self, now: float) -> Usage:
        """Return what the sequence has cost until now."""
        sequence = self.sequence
        start_s = now if self._start_s is None else self._start_s
        first_s = now if self._first_token_s is None else self._first_token_s
        return Usage(
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_cached_tokens=sequence.num_reused_tokens or 0,
            num_computed_tokens=sequence.num_written_prompt_tokens,
            num_preemptions=sequence.num_preemptions,
            queue_s=start_s - self._begin_s,
            prefill_s=first_s - start_s,
            decode_s=now - first_s,
        )
