"""A node: a place on the bus with one or several actors in it, and everything outside that they may touch.

Actors reach time, randomness, ids and threads only here, so that a simulation can run them to the seed. The node
keeps the links (links.py) and serves what arrives over them (serving.py); here is what its actors see.
"""

import asyncio
import functools
import logging
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, Self, TypeVar

import msgspec

from .address import Address
from .calls import FOREVER, Asked, Call, OpenStream, PendingAsk, Pipe, current_call, enter_call, leave_call
from .clock import Clock
from .deadlines import Deadlines
from .errors import LinkLost, words_of
from .frames import ASK, STREAM, TELL, Post, TracedPost
from .limited import LimitedWork
from .link import Link, LocalLink
from .links import LinkConfig, Links
from .mailbox import Mailbox
from .messages import Message, Stream, Tell, answer_type
from .notes import Note
from .place import Place
from .ref import Items, Ref
from .serving import Server
from .tasks import Tasks
from .traced import Root
from .transports.contract import Transport
from .watchdog import GuestOf, Watchdog
from .worker import Worker

if TYPE_CHECKING:
    from .keys import FleetKeys

T = TypeVar("T")
AfterCrash = Callable[[], Coroutine[Any, Any, None]]
log = logging.getLogger("callboard.bus")

DEFAULT_TIMEOUT_S = 30.0


class Node(Place):
    """A process's (or a test's) place on the bus. Use as ``async with Node("a", endpoint="ipc:///run/a.sock")``.

    ``endpoint`` may be left out by a node that only dials others. ``fleet`` keeps fleets apart: nodes of different
    ones refuse each other. With a ``seed`` everything the node draws is the same every time. With ``keys`` it speaks
    to holders of the same ones alone.
    """

    def __init__(
        self,
        name: str,
        *,
        endpoint: str = "",
        transport: Transport | None = None,
        fleet: str = "",
        seed: int | None = None,
        clock: Clock | None = None,
        links: LinkConfig | None = None,
        on_crash: Callable[[str, BaseException], None] | None = None,
        keys: "FleetKeys | None" = None,
    ) -> None:
        self.rng = random.Random(None if seed is None else f"{seed}/{name}")
        if transport is None and keys is not None:
            from .transports.keyed import KeyedTransport

            transport = KeyedTransport(keys, name)
        elif transport is None:
            from .transports.zmq import ZmqTransport

            transport = ZmqTransport()
        super().__init__(
            name,
            fleet=fleet,
            endpoint=endpoint,
            incarnation=self.new_id(),
            clock=clock or Clock(),
            transport=transport,
            keys=keys,
        )
        self._on_crash = on_crash
        self._after_crash: dict[str, AfterCrash] = {}
        self._crashes = Tasks(lambda error: log.error("while stopping a broken actor", exc_info=error))
        self._server = Server(self, self.crash)
        encode_into = msgspec.msgpack.Encoder(enc_hook=_encode_ref).encode_into
        self._links = Links(self, encode_into, links or LinkConfig(), self._server)
        self._local: LocalLink | None = None
        self._is_stopping = False
        self._kinds: dict[type, _Kind] = {}
        self._loop: asyncio.AbstractEventLoop

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self.deadlines = Deadlines()
        self._server.start()
        self._local = LocalLink(self._server.on_frames, self.clock, self.name, self.incarnation)
        self.endpoint = await self.transport.start(self.endpoint, self._links)
        self._links.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """End all that is served and asked, tell the peers, and close. A repeat does nothing."""
        if self._local is None or self._is_stopping:
            return
        self._is_stopping = True
        for name in self._server.names():
            self.remove(name)
        # All of it, even if whoever stops it is cancelled: a socket left open blocks the end of its context for ever.
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._crashes.cancel)
            stack.callback(self._end_local)
            stack.push_async_callback(self._links.stop)
            await asyncio.sleep(0)
            await self._server.stop()

    def _end_local(self) -> None:
        local, self._local = self._local, None
        assert local is not None
        for asked in list(local.asked.values()):
            asked.forget()
            asked.fail(LinkLost("the node stopped"))
        local.close()

    # ---- actors --------------------------------------------------------------------------------------------------

    def add(self, name: str, actor: object, *, after_crash: AfterCrash | None = None) -> Ref:
        """Make ``actor`` reachable as ``name``: any object with ``on_*`` handlers. Raises ValueError, TypeError.

        ``after_crash`` is run once if a bug stops the actor: to end what it has under way.
        """
        self._server.add(Mailbox(name, actor, self._decode_ref))
        if after_crash is not None:
            self._after_crash[name] = after_crash
        return Ref(self, self.address_of(name))

    def remove(self, name: str) -> None:
        """Take an actor off the bus: what it serves ends with ActorDied. Unknown names are ignored."""
        self._after_crash.pop(name, None)
        self._server.remove(name, f"{name}@{self.name} was stopped")

    def crash(self, name: str, error: BaseException) -> None:
        """Stop an actor because of a bug in it; ``on_crash`` hears of it (a process then exits)."""
        log.error("actor %s crashed", name, exc_info=error)
        self._server.remove(name, f"{name}@{self.name} crashed: {words_of(error)}")
        after_crash = self._after_crash.pop(name, None)
        if after_crash is not None:
            token = enter_call(None)  # Not of the call that crashed: its deadline is not that of the clean-up.
            self._crashes.spawn(after_crash())
            leave_call(token)
        if self._on_crash is not None:
            self._on_crash(name, error)

    def address_of(self, name: str) -> Address:
        """Return the address of an actor of this node."""
        return Address(self.name, self.endpoint, name)

    def ref(self, address: Address) -> Ref:
        """Return a ref to any actor on the bus. Nothing is sent."""
        return Ref(self, address)

    @property
    def num_strangers(self) -> int:
        """Connections turned away because they did not show the fleet's keys."""
        num: int = getattr(self.transport, "num_strangers", 0)
        return num

    @property
    def num_links(self) -> int:
        """Nodes it is linked to at this moment."""
        return self._links.num_open

    @property
    def num_refused(self) -> int:
        """Batches and peers turned away: malformed, out of order, of another fleet or version."""
        return self._links.num_refused

    # ---- what a simulation replaces ------------------------------------------------------------------------------

    def new_id(self) -> str:
        """Return a short id that does not occur twice."""
        return f"{self.rng.getrandbits(64):016x}"

    async def run_blocking(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run a blocking function in a worker thread (inline on a virtual clock) and return its result."""
        if self.clock.is_virtual:
            await asyncio.sleep(0)
            return function(*args, **kwargs)
        call = functools.partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(None, call)

    def limited(self, function: Callable[..., T], *args: Any) -> LimitedWork[T]:
        """Return a call of a guest's code that may never end, in a thread of its own (inline on a virtual clock)."""
        return LimitedWork(function, *args, is_inline=self.clock.is_virtual)

    def watchdog(self, hung_s: float, guest_of: GuestOf, **told: Any) -> Watchdog | None:
        """Watch the loop from now on: see Watchdog. None where nobody can, as on a virtual clock."""
        watchdog = None if self.clock.is_virtual else Watchdog(hung_s, guest_of, **told)
        return watchdog if watchdog is not None and watchdog.start() else None

    def worker(self) -> Worker:
        """Return a thread of the caller's own (inline on a virtual clock); the caller closes it."""
        return Worker(is_inline=self.clock.is_virtual)

    # ---- sending (Ref is the way in) -----------------------------------------------------------------------------

    def send_tell(self, to: Address, message: Message) -> None:
        """See Ref.tell."""
        link = self._link(to)
        call, kind = current_call(), self._kinds.get(type(message)) or self._kind(type(message))
        request_id = "" if call is None and not kind.has_request_id else _request_of(message, kind, call)
        body: Any = message
        if request_id or self.tap is not None:
            self._post_traced(link, call, 0, TELL, to.actor, body, None, request_id, 0)
        else:
            link.post(Post(0, TELL, to.actor, body))

    def start_ask(self, to: Address, message: Message, timeout: float | None) -> PendingAsk:
        """See Ref.ask: whoever asks awaits ``future`` and cancels."""
        # Hot: once per ask (bench/bus.py).
        kind = self._kinds.get(type(message)) or self._kind(type(message))
        link = self._link(to)
        pending = PendingAsk(link, _as_it_is if link is self._local else kind.decode, self._loop)
        self._start(pending, to, message, kind, ASK, timeout, 0)
        return pending

    @asynccontextmanager
    async def open_stream(
        self, to: Address, message: Message, timeout: float | None, credit: int
    ) -> AsyncIterator[Items[Any]]:
        """See Ref.stream."""
        if credit < 1:
            raise ValueError(f"a stream takes credit for one item at least, not {credit}")
        kind = self._kind(type(message))
        link = self._link(to)
        stream = OpenStream(link, _as_it_is if link is self._local else kind.decode, self._loop, credit)
        self._start(stream, to, message, kind, STREAM, timeout, credit)
        try:
            yield stream
        finally:
            stream.cancel()

    def _start(
        self, asked: Asked, to: Address, message: Message, kind: "_Kind", way: int, timeout: float | None, credit: int
    ) -> None:
        # Hot: once per ask (bench/bus.py).
        body: Any = message  # Encoded in place; typed Raw for the receiving side.
        call = current_call()
        try:
            seconds = DEFAULT_TIMEOUT_S if timeout is None and call is None else _seconds(timeout, call)
            request_id = "" if call is None and not kind.has_request_id else _request_of(message, kind, call)
            post = (asked.id, way, to.actor, body, seconds, request_id, credit)
            if request_id or self.tap is not None:
                asked.note = self._post_traced(asked.link, call, *post)
            else:
                asked.link.post(Post(*post))
        except BaseException:
            asked.forget()  # A deadline that is none, or it does not encode: nothing was sent.
            raise
        if seconds != FOREVER:
            asked.what = (to, type(message), seconds)
            asked.slot = self.deadlines.add(asked, seconds)

    def _post_traced(
        self,
        link: Pipe,
        call: Call | None,
        call_id: int,
        way: int,
        actor: str,
        message: Any,
        seconds: float | None,
        request_id: str,
        credit: int,
    ) -> Note:
        """Send a message that is recorded, and return the note of its end."""
        # Hot: once per message of a request (bench/taps.py).
        span, trace = self.new_span(), "" if call is None else call.trace
        note = Note(self, call, actor, link.name, type(message).__name__, request_id, span)
        post = TracedPost(call_id, way, actor, message, seconds, request_id, credit, span, trace)
        note.sent(message, link.post(post))
        return note

    def root(self, actor: str, request_id: str, *, span: int, trace: str = "") -> Root:
        """Return what stands for a request from outside: with ``enter_call`` it is the parent of what is sent."""
        return Root(actor, request_id, self.clock, span=span, trace=trace)

    def _link(self, to: Address) -> Link:
        local = self._local
        if local is None:
            raise LinkLost(f"node {self.name} is not running")
        if to.endpoint == self.endpoint and to.node == self.name:
            return local
        return self._links.to(to)

    def _kind(self, message_type: type) -> "_Kind":
        kind = self._kinds.get(message_type)
        if kind is None:
            begin = self.clock.now()
            kind = self._kinds[message_type] = _Kind(message_type, self._decode_ref)
            self.note_turn(current_call(), begin)
        return kind

    def _decode_ref(self, kind: type, value: Any) -> Any:
        if kind is Ref:
            return Ref(self, msgspec.convert(value, Address))
        raise TypeError(f"{kind.__name__} does not travel on the bus")


class _Kind:
    """What sending a type of message takes."""

    __slots__ = ("decode", "has_request_id")

    def __init__(self, message_type: type[Any], dec_hook: Callable[[type, Any], Any]) -> None:
        self.has_request_id = "request_id" in message_type.__struct_fields__
        """Its own, by which everything sent for a request can be told."""
        self.decode: Any = None
        if not issubclass(message_type, Tell):
            answer = answer_type(message_type)
            if issubclass(message_type, Stream):
                answer = list[answer]  # type: ignore[valid-type]
            self.decode = msgspec.msgpack.Decoder(answer, dec_hook=dec_hook).decode


def _request_of(message: Any, kind: _Kind, call: Call | None) -> str:
    """Return the request a message belongs to: that of the call it is sent in, or its own."""
    if call is not None and call.request_id:
        return call.request_id
    request_id = message.request_id if kind.has_request_id else ""
    return request_id if type(request_id) is str else ""


def _as_it_is(body: Any) -> Any:
    """Return what comes over the node's link to itself, which was never encoded."""
    return body


def _seconds(timeout: float | None, call: Call | None) -> float:
    """Return how long an ask may take: what its caller says, within what remains of the call it is sent in."""
    if call is None:
        seconds = DEFAULT_TIMEOUT_S if timeout is None else timeout
    else:
        remaining = call.remaining_s()
        if timeout is None:
            seconds = DEFAULT_TIMEOUT_S if remaining == FOREVER else remaining
        else:
            seconds = min(timeout, remaining)
    if not seconds >= 0:
        if seconds != seconds:
            raise ValueError("a timeout must be a number")
        return 0.0
    return seconds


def _encode_ref(value: Any) -> Any:
    if isinstance(value, Ref):
        return value.address
    raise TypeError(f"{type(value).__name__} does not travel on the bus: messages are data (bus/messages.py)")
