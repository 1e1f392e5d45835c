"""Serving: what arrives for this node's actors is opened, run, and ended exactly once."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from .calls import FOREVER, Served, enter_call, error_of, leave_call
from .errors import ActorDied, AskTimeout, BusError, LinkLost, NotUnderstood, Refusal, UnknownActor
from .frames import ASK, STREAM, TELL, Answer, Cancel, Credit, End, Fail, Frame, Item, Post
from .link import Link
from .mailbox import Handler, Mailbox
from .place import Place
from .tasks import Tasks

log = logging.getLogger("callboard.bus")


class Server:
    """The actors of one node and the calls they serve."""

    def __init__(self, node: Place, crash: Callable[[str, BaseException], None]) -> None:
        self.num_refused = 0
        """Messages turned away at a mailbox."""
        self._node = node
        self._crash = crash
        self._mailboxes: dict[str, Mailbox] = {}
        self._serving: dict[Served, None] = {}
        self._tasks = Tasks(lambda error: log.error("in a handler's task", exc_info=error))

    def names(self) -> list[str]:
        """Return the names of the actors here."""
        return list(self._mailboxes)

    def add(self, mailbox: Mailbox) -> None:
        """Take an actor in. Raises ValueError if the name is taken."""
        if mailbox.name in self._mailboxes:
            raise ValueError(f"node {self._node.name} has an actor {mailbox.name} already")
        self._mailboxes[mailbox.name] = mailbox

    def remove(self, name: str, text: str) -> None:
        """Take an actor out; its callers get ActorDied."""
        if self._mailboxes.pop(name, None) is not None:
            for served in [served for served in self._serving if served.actor == name]:
                served.end("stopped", Fail(served.id, "actor_died", text))

    async def stop(self) -> None:
        """End every handler and wait for it."""
        await self._tasks.cancel()

    # ---- frames --------------------------------------------------------------------------------------------------

    def on_frame(self, link: Link, frame: Frame) -> None:
        """Take a frame of an open link."""
        # Hot: once per message (bench/bus.py). The most frequent kinds stand first.
        if link.is_broken:
            return
        kind = type(frame)
        if kind is Item or kind is Answer:
            asked = link.asked.get(frame.id)  # type: ignore[attr-defined]
            if asked is not None:
                try:
                    asked.answer(frame.body)  # type: ignore[attr-defined]
                except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
                    asked.cancel()
                    asked.fail(NotUnderstood(actor=self._node.name, reason=f"an answer from {link.name}: {error}"))
        elif kind is Post:
            self._on_post(link, frame)  # type: ignore[arg-type]
        elif kind is Credit:
            served = link.served.get(frame.id)  # type: ignore[attr-defined]
            if served is not None:
                served.grant(max(0, frame.count))  # type: ignore[attr-defined]
        elif kind is Cancel:
            served = link.served.get(frame.id)  # type: ignore[attr-defined]
            if served is not None:
                served.end("cancelled")
        elif kind is End:
            asked = link.asked.get(frame.id)  # type: ignore[attr-defined]
            if asked is not None:
                asked.end()
        elif kind is Fail:
            asked = link.asked.get(frame.id)  # type: ignore[attr-defined]
            if asked is not None:
                asked.forget()
                asked.fail(error_of(frame))  # type: ignore[arg-type]

    def _on_post(self, link: Link, post: Post) -> None:
        mailbox = self._mailboxes.get(post.actor)
        try:
            if mailbox is None:
                raise UnknownActor(actor=post.actor, node=self._node.name)
            message, handler = mailbox.open(post.body)
            if post.kind != handler.kind or post.id in link.served or post.timeout != post.timeout:  # The last: NaN.
                raise NotUnderstood(actor=post.actor, reason="it was sent as what it is not")
        except Refusal as error:
            self._refuse(link, post, error)
            return
        if self._node.tap is not None:
            kind = type(message).__name__
            self._node.tap(self._node.clock.now(), "received", link.name, post.actor, kind, post.request_id)
        served = Served(
            link,
            post.id,
            post.kind,
            post.actor,
            clock=self._node.clock,
            caller=self._node.name if link.peer is None else link.peer.node,
            caller_incarnation=self._node.incarnation if link.peer is None else link.peer.incarnation,
            request_id=post.request_id,
            timeout=FOREVER if post.timeout is None else post.timeout,
        )
        if post.kind == TELL:
            self._run_tell(served, handler, message)
            return
        if post.kind == ASK and not handler.is_coroutine:
            self._run_inline(served, handler, message)
            return
        link.served[post.id] = served
        served.credit = max(1, post.credit)
        self._spawn(served, (self._run_stream if post.kind == STREAM else self._run_ask)(served, handler, message))
        if post.timeout is not None and post.timeout != FOREVER:
            served.timer = asyncio.get_running_loop().call_later(post.timeout, self._expire, served)

    def _refuse(self, link: Link, post: Post, error: Refusal) -> None:
        self.num_refused += 1
        if post.kind == TELL:
            log.warning("%s: a message from %s was refused: %s", self._node.name, link.name, error)
        else:
            link.post_fail(_refusal(post.id, error))

    def _expire(self, served: Served) -> None:
        served.end("timeout", Fail(served.id, "timeout", f"{served.actor} ran out of time"))

    # ---- running -------------------------------------------------------------------------------------------------

    def _run_inline(self, served: Served, handler: Handler, message: Any) -> None:
        token = enter_call(served)
        try:
            served.link.post(Answer(served.id, handler.call(message)))
        except Exception as error:
            self._failed(served, error, answer=True)
        finally:
            leave_call(token)

    def _run_tell(self, served: Served, handler: Handler, message: Any) -> None:
        if handler.is_coroutine:
            self._spawn(served, self._run_told(served, handler, message))
            return
        token = enter_call(served)
        try:
            handler.call(message)
        except Exception as error:
            self._failed(served, error, answer=False)
        finally:
            leave_call(token)

    def _spawn(self, served: Served, run: Coroutine[Any, Any, None]) -> None:
        self._serving[served] = None
        served.task = self._tasks.spawn(run)
        # Not in the coroutine's finally: a task cancelled before its first step never gets there.
        served.task.add_done_callback(lambda _: self._serving.pop(served, None))

    async def _run_told(self, served: Served, handler: Handler, message: Any) -> None:
        enter_call(served)
        try:
            await handler.call(message)
        except Exception as error:
            served.finish()
            self._failed(served, error, answer=False)

    async def _run_ask(self, served: Served, handler: Handler, message: Any) -> None:
        enter_call(served)
        try:
            answer = await handler.call(message)
            if served.is_open:
                served.link.post(Answer(served.id, answer))  # It may not encode: then the end is still to be told.
                served.finish()
        except asyncio.CancelledError:
            if served.finish():
                served.link.post(Fail(served.id, "actor_died", f"{served.actor} gave up on the call"))
        except Exception as error:
            self._failed(served, error, answer=served.finish())

    async def _run_stream(self, served: Served, handler: Handler, message: Any) -> None:
        enter_call(served)
        items = handler.call(message)
        link = served.link
        try:
            async for item in items:
                if not served.is_open:  # It goes on after its cancellation: nobody gives it credit any more.
                    break
                if served.credit <= 0:
                    await served.has_credit()
                served.credit -= 1
                link.post(Item(served.id, item))
            if served.finish():
                link.post(End(served.id))
        except asyncio.CancelledError:
            if served.finish():
                link.post(Fail(served.id, "actor_died", f"{served.actor} gave up on the stream"))
        except Exception as error:
            self._failed(served, error, answer=served.finish())
        finally:
            try:
                await items.aclose()
            except Exception as error:
                self._failed(served, error, answer=False)

    def _failed(self, served: Served, error: Exception, *, answer: bool) -> None:
        """Tell the caller of a handler's exception, if it is still to be told; a bug stops the actor."""
        where = f"{served.actor}@{self._node.name}"
        if isinstance(error, Refusal):
            fail = _refusal(served.id, error)
        elif isinstance(error, (AskTimeout, TimeoutError)):
            fail = Fail(served.id, "timeout", f"{where}: {error or 'out of time'}")
        elif isinstance(error, LinkLost):
            fail = Fail(served.id, "link_lost", f"{where}: {error}")
        elif isinstance(error, (ActorDied, BusError)):
            fail = Fail(served.id, "actor_died", f"{where}: {error}")
        else:
            fail = Fail(served.id, "actor_died", f"{where} crashed: {type(error).__name__}: {error}")
            if answer:
                served.link.post_fail(fail)
            self._crash(served.actor, error)
            return
        if answer:
            served.link.post_fail(fail)
        else:
            log.warning("%s: a handler ended with an error nobody waits for: %r", where, error)


def _refusal(call_id: int, error: Refusal) -> Fail:
    return Fail(call_id, "refusal", str(error), type(error).__name__, error.fields)
