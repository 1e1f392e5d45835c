"""A node's links: dialling, accepting, greeting, watching, breaking.

Between two nodes there is one link at a time in each direction of dialling; a node speaks over the one it dialled,
or over one the peer dialled if that was there first. A link that breaks is gone: the next message dials a new one.
What was under way ends with LinkLost, or with ActorDied where a pidfd or a goodbye proves the peer dead.
"""

import asyncio
import logging
from contextvars import Context, copy_context
from typing import Any

import msgspec

from .address import Address
from .calls import current_call
from .complaints import Complaints
from .errors import ActorDied, LinkLost
from .frames import (
    PROTOCOL_VERSION,
    Bye,
    Frame,
    Hello,
    PeerInfo,
    Ping,
    Pong,
    Refused,
    Welcome,
    decode_batch,
)
from .link import Link
from .liveness import ProcessWatch, local_host, own_pid
from .place import Place
from .serving import Server
from .tasks import Tasks
from .transports.contract import Connection

log = logging.getLogger("callboard.bus")

BYE_S = 0.5
"""How long a node that stops waits for its peers to have heard all it said."""
MOST_WORDS = 500
"""Characters of a name in a greeting, and of what is said and logged about a peer that is turned away."""
MOST_REMEMBERED = 256
"""So many peers that have greeted, and so many whose links broke, are remembered."""
VERDICT_S = 0.2
"""A dying process's sockets close a moment before its pidfd tells: so long a broken link waits for its peer's fate."""


class LinkConfig(msgspec.Struct, frozen=True):
    """Time limits and bounds of a node's links."""

    dial_s: float = 1.0
    """How long an endpoint where nobody listens is dialled again before giving up."""
    redial_s: float = 0.05
    hello_s: float = 15.0
    """How long a peer that accepted may take to greet: a loaded process may be importing."""
    ping_s: float = 1.0
    silent_s: float = 5.0
    """A peer not heard of for this long is cut off, though its process may be alive: it is stopped, or its loop hangs.

    A serving engine's loop is late by half a second at worst, on a machine with three times as much work as cores.
    """
    max_backlog_bytes: int = 64 * 1024 * 1024
    """A peer that lets this much pile up is cut off: tells know no credit."""


class Links:
    """All links of one node. It is the transport's listener."""

    def __init__(self, node: Place, encode: Any, config: LinkConfig, server: Server) -> None:
        self.num_refused = 0
        """Batches and peers turned away: malformed, out of order, of another fleet or version."""
        self._node = node
        self._encode = encode
        self._config = config
        self._server = server
        self._now = node.clock.now
        self._complaints = Complaints(log, node.name, node.clock)
        self._tasks = Tasks(lambda error: log.error("in a link's task", exc_info=error))
        self._links: dict[Link, None] = {}
        """All that are not broken."""
        self._by_key: dict[str, Link] = {}
        self._by_connection: dict[Connection, Link] = {}
        self._met: dict[str, None] = {}
        """Endpoints of peers that have greeted: they are up, and to greet again takes them no longer than a pong."""
        self._gone: dict[str, None] = {}
        """Incarnations whose accepted links broke here: what they sent before they heard of it may still come."""
        self._host = ""
        self._pid = (0, 0)
        self._watch: Any = ProcessWatch
        self._context: Context
        """That of the node's start. A socket's callbacks keep theirs, and must not keep the call that dialled."""
        self._is_stopped = False
        self._all_left: asyncio.Future[None] | None = None

    @property
    def num_open(self) -> int:
        """Links over which both sides have greeted."""
        return sum(link.is_open for link in self._links)

    def start(self) -> None:
        """Begin to watch over the links."""
        self._context = copy_context()
        if self._node.exchange is None:  # Nodes of one process need not watch each other's.
            self._host, self._pid = local_host(), own_pid()
        elif (host := getattr(self._node.transport, "host", None)) is not None:  # Simulated processes do.
            self._host, self._pid, self._watch = host.name, host.pid, host.watch
        self._tasks.spawn(self._ping())

    async def stop(self) -> None:
        """Say goodbye on every link and close."""
        self._is_stopped = True
        self._by_key.clear()
        for link in list(self._links):
            if link.is_open and link.connection is not None:
                link.say_bye()
            else:
                self._stopped(link)
        # ZeroMQ drops what a peer has not read yet when it hears of the end. So the peer says Bye, too, and then we go.
        try:
            await self._tasks.cancel()
            if self._links:
                self._all_left = asyncio.get_running_loop().create_future()
                await asyncio.wait([self._all_left], timeout=BYE_S)
        finally:
            for link in list(self._links):
                self._stopped(link)
            await self._node.transport.stop()

    def to(self, address: Address) -> Link:
        """Return the link to a node, dialling if there is none."""
        key = address.endpoint or _key("", address.node)
        link = self._by_key.get(key)
        if link is None:
            link = self._new_link(address.endpoint)
            link.node = address.node
            self._by_key[key] = link
            if self._is_stopped:  # A link made now would be nobody's to break, and its socket nobody's to close.
                self._break_soon(link, "the node stopped")
            elif address.endpoint:
                link.dial_until = self._node.clock.now() + self._config.dial_s
                self._dial(link)
                self._node.note_turn(current_call(), link.last_heard, "dial")
            else:
                self._break_soon(link, f"node {address.node} is not linked and cannot be dialled")
        return link

    def _new_link(self, endpoint: str) -> Link:
        link = Link(
            self._encode, self._node.incarnation, endpoint=endpoint, max_backlog_bytes=self._config.max_backlog_bytes
        )
        link.on_overflow = self._overflow
        link.last_heard = self._node.clock.now()
        self._links[link] = None
        return link

    def _dial(self, link: Link) -> None:
        if link.is_broken:
            return
        try:
            link.connection = self._context.run(self._node.transport.dial, link.endpoint, link.node)
        except OSError as error:
            self._break_soon(link, str(error))
            return
        link.begin_numbering()
        self._by_connection[link.connection] = link
        link.send_now(self._info(Hello))

    def _info(self, kind: type[Any]) -> Frame:
        node = self._node
        proof = b"" if node.keys is None else node.keys.proof(node.name, node.incarnation)
        frame: Frame = kind(
            PROTOCOL_VERSION, node.fleet, node.name, node.incarnation, node.endpoint, self._host, *self._pid, proof
        )
        return frame

    # ---- the transport's listener --------------------------------------------------------------------------------

    def accepted(self, connection: Connection) -> None:
        if self._is_stopped:
            return
        link = self._new_link("")
        link.connection = connection
        self._by_connection[connection] = link

    def received(self, connection: Connection, batch: bytes | bytearray) -> None:
        # Hot: once per batch (bench/bus.py).
        link = self._by_connection.get(connection)
        if link is None:
            return
        try:
            incarnation, sequence, frames = decode_batch(batch)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            self._turn_away(link, f"sent a batch that is none: {error}")
            return
        expected = link.num_received
        link.num_received = expected + 1
        if sequence and not expected and incarnation in self._gone and not link.endpoint:
            # On its way when the link that it was for broke here: late, and nobody's fault.
            link.send_now(Refused("goes on with a link that is no more"))
            self._break(link, LinkLost("a link that is no more"), "link_lost")
            return
        if sequence != expected or (link.is_open and incarnation != link.peer_incarnation):
            self._turn_away(link, f"sent batch {sequence} of {incarnation} out of order")
            return
        link.last_heard = self._now()
        try:
            if link.is_open:
                if len(frames) == 1:
                    link.is_calm = True
                self._server.on_frames(link, frames, self._on_frame)
            elif frames:
                self._greet(link, frames[0], incarnation)
                self._server.on_frames(link, frames[1:], self._on_frame)
            else:
                self._turn_away(link, "did not begin with a greeting")
        except Exception as error:  # A bug here. The rest of the batch is lost, and that must not go unnoticed.
            log.exception("%s: while taking a batch of %s", self._node.name, link.name)
            self._turn_away(link, f"sent what broke this node's bus: {error!r}")

    def closed(self, connection: Connection, reason: str) -> None:
        link = self._by_connection.pop(connection, None)
        if link is None or link.is_broken:
            return
        link.connection = None
        if link.peer is None and link.endpoint and self._node.clock.now() < link.dial_until:
            asyncio.get_running_loop().call_later(self._config.redial_s, self._dial, link)
            return
        error = LinkLost(f"the link to {link.name} broke: {reason}")
        if link.watch is None:
            self._break(link, error, "link_lost")
        else:
            self._unlist(link)
            asyncio.get_running_loop().call_later(VERDICT_S, self._break, link, error, "link_lost")

    # ---- frames --------------------------------------------------------------------------------------------------

    def _greet(self, link: Link, frame: Frame, incarnation: str) -> None:
        match frame:
            case Hello() if not link.endpoint:
                if reason := self._objection(frame, incarnation):
                    self._turn_away(link, f"was refused: {reason}")
                    return
                # First of what waits, not by itself: a transport that has no room is asked again.
                link.is_open = True
                link.post(self._info(Welcome))
            case Welcome() if link.endpoint:
                if reason := self._objection(frame, incarnation, link.node):
                    self._turn_away(link, reason)
                    return
            case Refused(reason):
                self._break(link, LinkLost(f"{link.name} turned this node away: it {reason}"), "link_lost")
                return
            case _:
                self._turn_away(link, "did not begin with a greeting")
                return
        assert isinstance(frame, PeerInfo)
        key = _key(frame.endpoint, frame.node)
        for old in list(self._links):
            if old is link or old.peer is None or _key(old.peer.endpoint, old.peer.node) != key:
                continue
            if old.peer.incarnation != frame.incarnation:
                self._break(old, ActorDied(f"node {frame.node} was restarted"), "actor_died")
            elif not link.endpoint and not old.endpoint:
                # It has lost what it dialled before. What is still on its way there must not come after what is here.
                self._break(old, LinkLost(f"node {frame.node} dialled anew"), "link_lost")
        link.peer = frame
        link.peer_node, link.peer_incarnation = frame.node, frame.incarnation
        link.is_open = True
        self._by_key.setdefault(key, link)
        if link.endpoint:
            _remember(self._met, link.endpoint)
        if frame.host and frame.host == self._host and frame.pid != self._pid[0]:
            link.watch = self._watch(frame.pid, frame.pid_start, lambda: self._died(link))
        link.schedule_flush()

    def _objection(self, info: PeerInfo, incarnation: str, node: str | None = None) -> str:
        if max(map(len, (info.node, info.endpoint, info.incarnation, info.host))) > MOST_WORDS:
            return "a name in its greeting is too long"
        if info.version != PROTOCOL_VERSION:
            return f"protocol version {info.version} is not {PROTOCOL_VERSION}"
        if info.fleet != self._node.fleet:
            return f"fleet {info.fleet!r} is not {self._node.fleet!r}"
        if info.incarnation != incarnation:
            return "the greeting and its batch name different incarnations"
        keys = self._node.keys
        if keys is None:
            return ""
        if not keys.is_proof(info.proof, info.node, info.incarnation) or node not in (None, info.node):
            return f"it has not shown the key of node {node or info.node!r}"
        return ""

    def _on_frame(self, link: Link, frame: Frame) -> None:
        match frame:
            case Ping():
                link.post(Pong())
            case Pong():
                pass
            case Bye() if self._is_stopped:
                self._stopped(link)
            case Bye():
                link.say_bye()
                self._break(link, ActorDied(f"node {link.name} stopped"), "actor_died")
            case Refused(reason):
                self._break(link, LinkLost(f"{link.name} cut the link: this node {reason}"), "link_lost")
            case Hello() | Welcome():
                self._turn_away(link, "greeted twice")

    # ---- ends ----------------------------------------------------------------------------------------------------

    def _turn_away(self, link: Link, what: str) -> None:
        self.num_refused += 1
        what = what[:MOST_WORDS]  # It may quote what the peer sent, which may be megabytes.
        self._complaints.about(link.name, what)
        if link.connection is not None:
            link.send_now(Refused(what))  # Else a peer that dialled would wait for answers until its deadlines.
        self._break(link, LinkLost(f"{link.name} {what}"), "link_lost")

    def _stopped(self, link: Link) -> None:
        self._break(link, LinkLost("the node stopped"), "stopped")

    def _died(self, link: Link) -> None:
        self._break(link, ActorDied(f"the process of node {link.name} ended"), "actor_died")

    def _overflow(self, link: Link) -> None:
        if not link.is_broken:
            self._turn_away(link, "does not read: too much is waiting for it")

    def _break(self, link: Link, error: ActorDied | LinkLost, reason: str) -> None:
        if link.is_broken:
            return
        if link.connection is not None:
            self._by_connection.pop(link.connection, None)
        link.close()
        self._links.pop(link, None)
        if link.peer_incarnation and not link.endpoint:
            _remember(self._gone, link.peer_incarnation)
        if self._all_left is not None and not self._all_left.done() and not any(each.is_open for each in self._links):
            self._all_left.set_result(None)
        self._unlist(link)
        for asked in list(link.asked.values()):
            asked.forget()
            asked.fail(error)
        for served in list(link.served.values()):
            served.end(reason)

    def _break_soon(self, link: Link, why: str) -> None:
        # Not at once: whoever asks for the link is about to ask something over it.
        asyncio.get_running_loop().call_soon(self._break, link, LinkLost(why), "link_lost")

    def _unlist(self, link: Link) -> None:
        for key in [key for key, value in self._by_key.items() if value is link]:
            del self._by_key[key]

    async def _ping(self) -> None:
        woken = self._node.clock.now()
        while True:
            await self._node.clock.sleep(self._config.ping_s)
            self._server.sweep()
            now = self._node.clock.now()
            # This node may have hung itself. What its peers said meanwhile is still to be read.
            late, woken = max(0.0, now - woken - 2 * self._config.ping_s), now
            for link in list(self._by_connection.values()):
                link.last_heard = min(now, link.last_heard + late)
                silent = now - link.last_heard
                is_met = link.is_open or link.endpoint in self._met
                if silent > (self._config.silent_s if is_met else self._config.hello_s):
                    error = LinkLost(f"{link.name} has not been heard of for {silent:.1f} s")
                    self._break(link, error, "link_lost")
                elif link.is_open and silent >= self._config.ping_s * 0.5:
                    link.post(Ping())


def _remember(table: dict[str, None], name: str) -> None:
    table[name] = None
    if len(table) > MOST_REMEMBERED:
        del table[next(iter(table))]


def _key(endpoint: str, node: str) -> str:
    return endpoint or f"node:{node}"
