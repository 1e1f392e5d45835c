"""The wire between hosts: UCX, through ucxx (or ucx-py where that is installed). Nothing else here knows either.

What the library does decides the shape of this file. A request that was begun cannot be taken back: one that Python
gives up goes on writing into its buffer, so none ever is; it ends by itself or with its endpoint. Closing an endpoint
takes as long as the library's own thread is busy, so that happens in a thread. A peer that was killed shows as an
error of its endpoint within milliseconds, and one that was stopped never: that is for the bus to notice.

Strangers can reach the listener's port. An endpoint shows what it was invited by before it is let in, and is shown
something in return; pages travel under random tags that only the two ends know of, in the clear.
"""

import asyncio
import importlib.util
import logging
import os
import secrets
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar, TypeVar

from callboard.bus.tasks import Tasks

from .net_device import use_device_of
from .wire import Invitation, WireBroken, WiresMissing

T = TypeVar("T")
log = logging.getLogger("callboard.kv.ucx")

SHOW_S = 3.0
"""How long an endpoint may take to show why it is here, and a sender to find its receiver."""
END_S = 15.0
"""How long what is under way may take to end once its endpoint is closed: the library takes 10 s for that at most."""
MOST_STRANGERS = 16
"""Endpoints that have not shown it yet."""
KEY_BYTES = 16
LIBRARIES = ("ucxx", "ucp")
OPTIONS = {"RNDV_SCHEME": "put_zcopy"}
"""Straight from buffer to buffer. On TCP the library would choose fragments of 8 KiB, which it copies at both ends:
half as fast (bench/transfer.py). The environment (``UCX_RNDV_SCHEME=auto``) goes before."""
MISSING = 'KV pages go between hosts over UCX, which is not installed here: run pip install "callboard[ucx]"'


def is_installed() -> bool:
    """Return whether there is a UCX library here, without loading it."""
    return any(importlib.util.find_spec(name) is not None for name in LIBRARIES)


def host_of(endpoint: str) -> str:
    """Return by which address others reach the host of a node: that of its endpoint, the loopback if it has none."""
    if not endpoint.startswith("tcp://"):
        return "127.0.0.1"
    return endpoint.removeprefix("tcp://").rpartition(":")[0]


def _load() -> Any:
    """Import the library. Raises WiresMissing."""
    os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")  # It would warn of its own on machines without a driver.
    for name in LIBRARIES:
        if importlib.util.find_spec(name) is not None:
            try:
                library = importlib.import_module(name)
            except (ImportError, OSError) as error:
                raise WiresMissing(f"{name} is installed, but cannot be loaded: {error}") from None
            # It would print a traceback for each stranger at the door.
            logging.getLogger("ucx").setLevel(logging.CRITICAL)
            return library
    raise WiresMissing(MISSING)


class Ucx:
    """The library, which exists once in a process: started by the first who opens it, ended by the last who closes.

    All of them are of one event loop.
    """

    _num_users: ClassVar[int] = 0

    def __init__(self, library: Any) -> None:
        self._library = library
        self._under_way: dict[asyncio.Future[Any], None] = {}
        self._discarding: dict[Any, asyncio.Future[None]] = {}

    @classmethod
    async def open(cls) -> "Ucx":
        """Load and start the library. Raises WiresMissing."""
        library = await _in_thread(_load)
        if not cls._num_users and hasattr(library, "stop_notifier_thread"):
            # The one mode that costs next to nothing while nothing moves.
            library.init(OPTIONS, env_takes_precedence=True, progress_mode="thread", enable_python_future=True)
        cls._num_users += 1
        return cls(library)

    def listen(self, accept: Callable[[Any], Coroutine[Any, Any, None]]) -> Any:
        """Return a listener at a free port of every address of this host."""
        return self._library.create_listener(accept, 0)

    async def connect(self, host: str, port: int, *, timeout_s: float = SHOW_S) -> Any:
        """Return an endpoint. Raises WireBroken."""
        try:
            return await self._library.create_endpoint(host, port, connect_timeout=timeout_s)
        except Exception as error:  # The library's own, which have no common base in all its versions.
            raise WireBroken(f"no endpoint at {host}:{port}: {_words(error)}") from None

    def discard(self, endpoint: Any) -> "asyncio.Future[None]":
        """Close an endpoint, and with it what is under way on it; the future is done when it is closed."""
        if endpoint not in self._discarding:
            self._discarding[endpoint] = self.see_out(self._abort(endpoint))
        return self._discarding[endpoint]

    def see_out(self, coroutine: Coroutine[Any, Any, T]) -> "asyncio.Future[T]":
        """Run what must not be given up half way; ``close`` waits for it."""
        future = asyncio.ensure_future(coroutine)
        self._under_way[future] = None
        future.add_done_callback(self._forget)
        return future

    def _forget(self, future: "asyncio.Future[Any]") -> None:
        del self._under_way[future]
        if not future.cancelled():
            future.exception()  # Raised where it is awaited, if it is.

    async def _abort(self, endpoint: Any) -> None:
        try:
            await _in_thread(endpoint.abort)
        except Exception:
            log.exception("an endpoint was not closed in order")
        finally:
            del self._discarding[endpoint]

    async def close(self) -> None:
        """Wait for every endpoint to be closed, and stop the library if nobody else has it.

        What never ends is left behind, and the library goes on with it.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + END_S
        while self._under_way:
            await asyncio.wait(self._under_way, timeout=until - loop.time())
            if self._under_way and loop.time() >= until:
                log.warning("UCX has not ended %d of its requests", len(self._under_way))
                return
        type(self)._num_users -= 1
        if not self._num_users and hasattr(self._library, "stop_notifier_thread"):
            context = self._library.core._ctx
            if context is not None:
                context.worker.stop_request_notifier_thread()  # Else the thread takes a second to notice.
            del context
            try:
                self._library.reset()
            except self._library.exceptions.UCXError as error:
                log.warning("UCX was not left in order: %s", error)


class UcxWire:
    """The sending end: one endpoint."""

    def __init__(self, ucx: Ucx, endpoint: Any) -> None:
        self._ucx = ucx
        self._endpoint = endpoint
        self._is_closed = False

    async def send(self, tag: int, data: memoryview) -> None:
        if self._is_closed:
            raise WireBroken("it is closed")
        await asyncio.shield(self._ucx.see_out(_carried(self._endpoint.send(data, tag=tag, force_tag=True))))
        if self._is_closed or self._endpoint.closed:
            raise WireBroken("it was closed meanwhile")  # Of which the library does not always tell.

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._ucx.discard(self._endpoint)


class UcxInlet:
    """The receiving end for one invited sender."""

    def __init__(self, ucx: Ucx) -> None:
        self.is_closed = False
        self._ucx = ucx
        self._endpoint: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def admit(self, endpoint: Any) -> None:
        """Take the sender's endpoint."""
        if self.is_closed or self._endpoint.done():
            self._ucx.discard(endpoint)
        else:
            self._endpoint.set_result(endpoint)

    async def receive(self, tag: int, buffer: memoryview) -> None:
        if self.is_closed:
            raise WireBroken("it is closed")
        done, _ = await asyncio.wait((self._endpoint,), timeout=SHOW_S)
        if not done:
            raise WireBroken("the sender has not shown itself")
        await asyncio.shield(self._ucx.see_out(self._receive(self._endpoint.result(), tag, buffer)))

    async def _receive(self, endpoint: Any, tag: int, buffer: memoryview) -> None:
        try:
            await _carried(endpoint.recv(buffer, tag=tag, force_tag=True))
        except WireBroken:
            # The sender may have been told to write into the buffer: it cannot once its connection is no more.
            await self._ucx.discard(endpoint)
            raise

    def close(self) -> None:
        if self.is_closed:
            return
        self.is_closed = True
        if not self._endpoint.done():
            self._endpoint.set_exception(WireBroken("it is closed"))
            self._endpoint.exception()  # Nobody may be waiting for it.
        elif self._endpoint.exception() is None:
            self._ucx.discard(self._endpoint.result())


class UcxListener:
    """Lets invited senders in, each to its inlet."""

    def __init__(self, ucx: Ucx, host: str, *, show_s: float = SHOW_S, most_strangers: int = MOST_STRANGERS) -> None:
        self.num_refused = 0
        """Endpoints that were sent away."""
        self._ucx = ucx
        self._show_s = show_s
        self._most_strangers = most_strangers
        self._num_strangers = 0
        self._invited: dict[bytes, tuple[bytes, UcxInlet]] = {}
        self._is_closed = False
        self._listener = ucx.listen(self._meet)
        self.address = f"{host}:{self._listener.port}"

    def invite(self) -> Invitation:
        """Expect one sender."""
        secret = secrets.token_bytes(2 * KEY_BYTES)
        inlet = UcxInlet(self._ucx)
        for shown in [shown for shown, (_, each) in self._invited.items() if each.is_closed]:
            del self._invited[shown]  # It never came.
        self._invited[secret[:KEY_BYTES]] = (secret[KEY_BYTES:], inlet)
        return Invitation(self.address, secret, inlet)

    def close(self) -> None:
        """Let nobody in any more. A repeat does nothing."""
        self._is_closed = True
        self._listener.close()
        for _, inlet in self._invited.values():
            inlet.close()

    async def _meet(self, endpoint: Any) -> None:
        if self._is_closed or self._num_strangers >= self._most_strangers:
            self.num_refused += 1
            self._ucx.discard(endpoint)
            return
        self._num_strangers += 1
        try:
            inlet = await self._ucx.see_out(self._identify(endpoint))
        finally:
            self._num_strangers -= 1
        if inlet is None:
            self.num_refused += 1
            self._ucx.discard(endpoint)
        else:
            inlet.admit(endpoint)

    async def _identify(self, endpoint: Any) -> UcxInlet | None:
        """Return the inlet that an endpoint was invited to; None if it shows nothing, or something else."""
        shown = memoryview(bytearray(KEY_BYTES))
        try:
            await _within(self._show_s, self._ucx, endpoint, endpoint.recv(shown))
            answer, inlet = self._invited.pop(bytes(shown))
            await _within(self._show_s, self._ucx, endpoint, endpoint.send(memoryview(answer)))
        except (WireBroken, KeyError):
            return None
        return inlet


class UcxWires:
    """The wires of one process; ``host`` is where others reach it."""

    @property
    def is_usable(self) -> bool:
        return is_installed()

    def __init__(self, host: str, *, show_s: float = SHOW_S) -> None:
        self._host = host
        self._show_s = show_s
        self._ucx: asyncio.Task[Ucx] | None = None
        self._listener: UcxListener | None = None
        self._wires: dict[UcxWire, None] = {}
        self._inlets: dict[UcxInlet, None] = {}
        self._tasks = Tasks(lambda error: None)  # Raised where it is awaited.

    def new_tag(self) -> int:
        return secrets.randbits(64)

    async def invite(self) -> Invitation:
        ucx = await self._open()
        if self._listener is None:
            self._listener = UcxListener(ucx, self._host, show_s=self._show_s)
        invitation = self._listener.invite()
        assert isinstance(invitation.inlet, UcxInlet)
        self._inlets = {inlet: None for inlet in self._inlets if not inlet.is_closed}
        self._inlets[invitation.inlet] = None
        return invitation

    async def connect(self, address: str, secret: bytes) -> UcxWire:
        ucx = await self._open()
        host, _, port = address.rpartition(":")
        if not port.isdecimal() or len(secret) != 2 * KEY_BYTES:
            raise WireBroken(f"{address} is no address of a wire")
        endpoint = await ucx.connect(host.strip("[]"), int(port), timeout_s=self._show_s)
        try:
            await _within(self._show_s, ucx, endpoint, endpoint.send(memoryview(secret[:KEY_BYTES])))
            shown = memoryview(bytearray(KEY_BYTES))
            await _within(self._show_s, ucx, endpoint, endpoint.recv(shown))
            if not secrets.compare_digest(shown, secret[KEY_BYTES:]):
                raise WireBroken(f"somebody else listens at {address}")
        except BaseException:
            ucx.discard(endpoint)
            raise
        wire = UcxWire(ucx, endpoint)
        self._wires = {wire: None for wire in self._wires if not wire._is_closed}
        self._wires[wire] = None
        return wire

    async def close(self) -> None:
        opening, self._ucx = self._ucx, None
        if self._listener is not None:
            self._listener.close()
        for wire in self._wires:
            wire.close()
        for inlet in self._inlets:
            inlet.close()
        self._wires.clear()
        self._inlets.clear()
        self._listener = None
        if opening is not None:
            await asyncio.wait((opening,))
            if not opening.cancelled() and opening.exception() is None:
                await opening.result().close()

    async def _open(self) -> Ucx:
        if self._ucx is None:
            use_device_of(self._host)
            self._ucx = self._tasks.spawn(Ucx.open())
        return await asyncio.shield(self._ucx)


async def _in_thread(function: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(None, function)


async def _carried(request: Coroutine[Any, Any, Any]) -> None:
    """Await what the library does. Raises WireBroken."""
    try:
        await request
    except Exception as error:
        raise WireBroken(_words(error)) from None


async def _within(seconds: float, ucx: Ucx, endpoint: Any, request: Coroutine[Any, Any, Any]) -> None:
    """Await what an endpoint does, and close it if that takes longer. Raises WireBroken."""
    task = ucx.see_out(_carried(request))
    done, _ = await asyncio.wait((task,), timeout=seconds)
    if not done:
        ucx.discard(endpoint)
    await asyncio.wait((task,))
    task.result()


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
