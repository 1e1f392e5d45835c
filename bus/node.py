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
from typing import Any, Self, TypeVar

import msgspec

from .address import Address
from .calls import FOREVER, Asked, OpenStream, PendingAsk, Pipe, current_call
from .clock import Clock
from .errors import LinkLost
from .frames import ASK, STREAM, TELL, Post
from .link import Link, LocalLink
from .links import LinkConfig, Links
from .mailbox import Mailbox
from .messages import Message, answer_type
from .place import Place
from .ref import Items, Ref
from .serving import Server
from .tasks import Tasks
from .transports.contract import Transport
from .worker import Worker

T = TypeVar("T")
AfterCrash = Callable[[], Coroutine[Any, Any, None]]
log = logging.getLogger("callboard.bus")

DEFAULT_TIMEOUT_S = 30.0


class Node(Place):
    """A process's (or a test's) place on the bus. Use as ``async with Node("a", endpoint="ipc:///run/a.sock")``.

    ``endpoint`` may be left out by a node that only dials others. ``fleet`` keeps fleets apart: nodes of different
    ones refuse each other. With a ``seed`` everything the node draws is the same every time.
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
    ) -> None:
        self.rng = random.Random(None if seed is None else f"{seed}/{name}")
        if transport is None:
            from .transports.zmq import ZmqTransport

            transport = ZmqTransport()
        super().__init__(
            name,
            fleet=fleet,
            endpoint=endpoint,
            incarnation=self.new_id(),
            clock=clock or Clock(),
            transport=transport,
        )
        self._encode = msgspec.msgpack.Encoder(enc_hook=_encode_ref).encode
        self._on_crash = on_crash
        self._after_crash: dict[str, AfterCrash] = {}
        self._crashes = Tasks(lambda error: log.error("while stopping a broken actor", exc_info=error))
        self._server = Server(self, self.crash)
        self._links = Links(self, self._encode, links or LinkConfig(), self._server)
        self._local: LocalLink | None = None
        self._is_stopping = False
        self._decoders: dict[type, Any] = {}

    async def __aenter__(self) -> Self:
        self._local = LocalLink(self._server.on_frame)
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
        self._server.remove(name, f"{name}@{self.name} crashed: {type(error).__name__}: {error}")
        after_crash = self._after_crash.pop(name, None)
        if after_crash is not None:
            self._crashes.spawn(after_crash())
        if self._on_crash is not None:
            self._on_crash(name, error)

    def address_of(self, name: str) -> Address:
        """Return the address of an actor of this node."""
        return Address(self.name, self.endpoint, name)

    def ref(self, address: Address) -> Ref:
        """Return a ref to any actor on the bus. Nothing is sent."""
        return Ref(self, address)

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

    def worker(self) -> Worker:
        """Return a thread of the caller's own (inline on a virtual clock); the caller closes it."""
        return Worker(is_inline=self.clock.is_virtual)

    # ---- sending (Ref is the way in) -----------------------------------------------------------------------------

    def send_tell(self, to: Address, message: Message) -> None:
        """See Ref.tell."""
        link = self._link(to)
        link.post(self._post(link, to, message, TELL, 0, None, 0))

    async def send_ask(self, to: Address, message: Message, timeout: float | None) -> Any:
        """See Ref.ask."""
        seconds = self._timeout(timeout)
        pending = PendingAsk(self._link(to), self._decoder(type(message)))
        self._start(pending, to, message, ASK, seconds, 0)
        try:
            return await pending.future
        finally:
            pending.cancel()

    @asynccontextmanager
    async def open_stream(
        self, to: Address, message: Message, timeout: float | None, credit: int
    ) -> AsyncIterator[Items[Any]]:
        """See Ref.stream."""
        seconds = self._timeout(timeout)
        stream = OpenStream(self._link(to), self._decoder(type(message)), credit)
        self._start(stream, to, message, STREAM, seconds, credit)
        try:
            yield stream
        finally:
            stream.cancel()

    def _start(self, asked: Asked, to: Address, message: Message, kind: int, timeout: float, credit: int) -> None:
        try:
            asked.link.post(self._post(asked.link, to, message, kind, asked.id, timeout, credit))
        except BaseException:
            asked.forget()  # It does not encode: nothing was sent.
            raise
        if timeout != FOREVER:
            loop = asyncio.get_running_loop()
            asked.timer = loop.call_later(timeout, asked.expire, f"{to} ({type(message).__name__})", timeout)

    def _post(
        self, link: Pipe, to: Address, message: Message, kind: int, call_id: int, timeout: float | None, credit: int
    ) -> Post:
        request_id = getattr(message, "request_id", "")
        if not isinstance(request_id, str):
            request_id = ""
        if not request_id and (call := current_call()) is not None:
            request_id = call.request_id
        if self.tap is not None:
            self.tap(self.clock.now(), "sent", link.name, to.actor, type(message).__name__, request_id)
        body: Any = message  # Encoded in place; typed Raw for the receiving side.
        return Post(call_id, kind, to.actor, body, timeout, request_id, credit)

    def _link(self, to: Address) -> Link:
        if self._local is None:
            raise LinkLost(f"node {self.name} is not running")
        if to.node == self.name and to.endpoint == self.endpoint:
            return self._local
        return self._links.to(to)

    @staticmethod
    def _timeout(timeout: float | None) -> float:
        if timeout != timeout:
            raise ValueError("a timeout must be a number")
        call = current_call()
        remaining = FOREVER if call is None else call.remaining_s()
        if timeout is None:
            timeout = DEFAULT_TIMEOUT_S if remaining == FOREVER else remaining
        return min(timeout, remaining)

    def _decoder(self, message_type: type) -> Any:
        decode = self._decoders.get(message_type)
        if decode is None:
            typed = msgspec.msgpack.Decoder(answer_type(message_type), dec_hook=self._decode_ref).decode

            def decode(body: Any) -> Any:
                return typed(body) if type(body) is msgspec.Raw else body

            self._decoders[message_type] = decode
        return decode

    def _decode_ref(self, kind: type, value: Any) -> Any:
        if kind is Ref:
            return Ref(self, msgspec.convert(value, Address))
        raise TypeError(f"{kind.__name__} does not travel on the bus")


def _encode_ref(value: Any) -> Any:
    if isinstance(value, Ref):
        return value.address
    raise TypeError(f"{type(value).__name__} does not travel on the bus: messages are data (bus/messages.py)")
