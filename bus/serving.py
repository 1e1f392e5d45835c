"""Serving: what arrives for this node's actors is opened, run, and ended exactly once."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from .calls import Asked, Served, enter_call, leave_call
from .complaints import Complaints
from .errors import BusError, NotUnderstood, Refusal, UnknownActor, words_of
from .failures import error_of, fail_of
from .frames import ASK, STREAM, TELL, Answer, Cancel, Credit, End, Fail, Frame, Items, Post, TracedPost
from .link import Link
from .mailbox import Handler, Mailbox
from .notes import error_text
from .place import Place
from .tasks import cancel_all
from .traced import TracedServed

log = logging.getLogger("callboard.bus")

STOP_S = 10.0
"""How long a node that stops waits for its handlers. Longer than a supervisor's patience: a handler that still writes
to shared memory must be proven dead before its node says goodbye."""
_UNDECODABLE = (msgspec.MsgspecError, ValueError, TypeError, RecursionError)


class Server:
    """The actors of one node and the calls they serve."""

    def __init__(self, node: Place, crash: Callable[[str, BaseException], None]) -> None:
        self.num_refused = 0
        """Messages turned away at a mailbox."""
        self._node = node
        self._crash = crash
        self._complaints = Complaints(log, node.name, node.clock)
        self._mailboxes: dict[str, Mailbox] = {}
        self._serving: dict[Served, None] = {}
        """The calls whose handlers run as tasks."""
        self._loop: asyncio.AbstractEventLoop
        self._task_class: type[asyncio.Task[Any]]

    def start(self) -> None:
        """Begin, on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._task_class = getattr(self._loop, "task_class", asyncio.Task)  # A simulation's tasks know their process.

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

    def drop(self, served: Served) -> None:
        """Forget a call whose task was cancelled before its first step; others take themselves out."""
        self._serving.pop(served, None)

    def sweep(self) -> None:
        """End what is past its deadline. In general its caller has cancelled it by then: this is for one that hangs."""
        for served in [served for served in self._serving if served.remaining_s() <= 0]:
            served.end("timeout", Fail(served.id, "timeout", f"{served.actor} ran out of time"))

    async def stop(self) -> None:
        """End every handler and wait for it; not for ever for one that ignores its cancellation."""
        for task in await cancel_all(
            (served.task for served in self._serving if served.task is not None), timeout_s=STOP_S
        ):
            log.warning("%s: %s ignores its cancellation: the node stops without it", self._node.name, _what(task))

    # ---- frames --------------------------------------------------------------------------------------------------

    def on_frames(
        self, link: Link, frames: Sequence[Frame], otherwise: Callable[[Link, Frame], None] | None = None
    ) -> None:
        """Take frames of an open link, until it breaks; those that belong to no call go to ``otherwise``."""
        # Hot: once per message (bench/bus.py). The most frequent kinds stand first.
        asked_of, served_of = link.asked, link.served
        for frame in frames:
            if link.is_broken:
                return
            kind = type(frame)
            if kind is Items or kind is Answer:
                asked = asked_of.get(frame.id)  # type: ignore[attr-defined]
                if asked is not None:
                    try:
                        (asked.items if kind is Items else asked.answer)(frame.body)  # type: ignore[attr-defined]
                    except _UNDECODABLE as error:
                        self._misunderstood(link, asked, error)
            elif kind is Post:
                self._on_post(link, frame, False)  # type: ignore[arg-type]
            elif kind is TracedPost:
                self._on_post(link, frame, True)  # type: ignore[arg-type]
            elif kind is Credit:
                served = served_of.get(frame.id)  # type: ignore[attr-defined]
                if served is not None:
                    served.grant(max(0, frame.count))  # type: ignore[attr-defined]
            elif kind is Cancel:
                served = served_of.get(frame.id)  # type: ignore[attr-defined]
                if served is not None:
                    served.end("cancelled")
            elif kind is End:
                asked = asked_of.get(frame.id)  # type: ignore[attr-defined]
                if asked is not None:
                    asked.end()
            elif kind is Fail:
                asked = asked_of.get(frame.id)  # type: ignore[attr-defined]
                if asked is not None:
                    asked.forget()
                    asked.fail(error_of(frame))  # type: ignore[arg-type]
            elif otherwise is not None:
                otherwise(link, frame)

    def _misunderstood(self, link: Link, asked: Asked, error: Exception) -> None:
        """What came is not what was asked for: the far side's bug, and the end of this call alone."""
        self.num_refused += 1
        if asked.forget():
            link.post(Cancel(asked.id))
        asked.fail(NotUnderstood(actor=self._node.name, reason=f"an answer from {link.name}: {error}"))

    def _on_post(self, link: Link, post: Post, is_traced: bool) -> None:
        mailbox = self._mailboxes.get(post.actor)
        call_id, timeout = post.id, post.timeout
        try:
            if mailbox is None:
                raise UnknownActor(actor=post.actor, node=self._node.name)
            message, handler = mailbox.open(post.body)
            kind = handler.kind
            is_named = call_id > 0 or kind == TELL
            if post.kind != kind or not is_named or call_id in link.served or timeout != timeout:  # The last: NaN.
                raise NotUnderstood(actor=post.actor, reason="it was sent as what it is not")
        except Refusal as error:
            self._refuse(link, post, error)
            return
        node = self._node
        if is_traced:
            served: Served = TracedServed(self, node, link, kind, post, message)  # type: ignore[arg-type]
        else:
            served = Served(self, link, call_id, kind, post.actor, node.clock, post.request_id, timeout)
        if not handler.is_task:
            self._run_inline(served, handler.call, message)
            return
        if kind == TELL:
            run = self._run_told(served, handler, message)
        else:
            link.served[call_id] = served
            if kind == STREAM:
                served.credit = max(1, post.credit)
                run = self._run_stream(served, handler, message)
            else:
                run = self._run_ask(served, handler, message)
        self._serving[served] = None
        served.task = self._task_class(run, loop=self._loop, name=post.actor)

    def _refuse(self, link: Link, post: Post, error: Refusal) -> None:
        self.num_refused += 1
        if post.kind == TELL:
            self._complaints.about(link.name, f"sent a message that was refused: {error}")
        else:
            link.post_fail(fail_of(post.id, error))

    # ---- running -------------------------------------------------------------------------------------------------

    def _run_inline(self, served: Served, handle: Callable[[Any], Any], message: Any) -> None:
        token = enter_call(served)
        try:
            answer = handle(message)
            if served.kind == ASK and served.is_open:
                if served.span:
                    served.ends()
                served.link.post(Answer(served.id, answer))
                if served.span:
                    served.note_end()
        except asyncio.CancelledError:  # Let through, it would take the rest of the batch with it.
            if served.kind == ASK and served.is_open:
                served.link.post(Fail(served.id, "actor_died", f"{served.actor} gave up on the call"))
                served.note_end("gave up")
        except Exception as error:
            self._failed(served, error, answer=served.kind == ASK and served.is_open)
        finally:
            leave_call(token)

    async def _run_told(self, served: Served, handler: Handler, message: Any) -> None:
        served.has_begun = True
        enter_call(served)
        try:
            await handler.call(message)
        except Exception as error:
            served.finish()
            self._failed(served, error, answer=False)
        finally:
            del self._serving[served]

    async def _run_ask(self, served: Served, handler: Handler, message: Any) -> None:
        served.has_begun = True
        enter_call(served)
        if served.span:
            served.note_turn()
        link = served.link
        try:
            answer = await handler.call(message)
            if served.is_open:
                if served.span:
                    served.ends()
                link.post(Answer(served.id, answer))  # It may not encode: then the end is still to be told.
                served.is_open = False
                del link.served[served.id]
                if served.span:
                    served.note_end()
        except asyncio.CancelledError:
            if served.finish():
                link.post(Fail(served.id, "actor_died", f"{served.actor} gave up on the call"))
                served.note_end("gave up")
        except Exception as error:
            self._failed(served, error, answer=served.finish())
        finally:
            del self._serving[served]

    async def _run_stream(self, served: Served, handler: Handler, message: Any) -> None:
        served.has_begun = True
        enter_call(served)
        if served.span:
            served.note_turn()
        items = handler.call(message)
        link, call_id = served.link, served.id
        post_item = link.post_item
        try:
            async for item in items:
                if served.credit <= 0:
                    if not served.is_open:  # It goes on after its cancellation: nobody gives it credit any more.
                        break
                    await served.has_credit()
                served.credit -= 1
                post_item(call_id, item)
            if served.finish():
                served.note_end()
                link.post(End(served.id))
        except asyncio.CancelledError:
            if served.finish():
                link.post(Fail(served.id, "actor_died", f"{served.actor} gave up on the stream"))
                served.note_end("gave up")
        except Exception as error:
            self._failed(served, error, answer=served.finish())
        finally:
            try:
                await items.aclose()
            except Exception as error:
                self._failed(served, error, answer=False)
            finally:
                self._serving.pop(served, None)

    def _failed(self, served: Served, error: Exception, *, answer: bool) -> None:
        """Tell the caller of a handler's exception, if it is still to be told; a bug stops the actor."""
        where = f"{served.actor}@{self._node.name}"
        if answer and served.span:
            served.note_end(error_text(error))
        if isinstance(error, BusError | TimeoutError):
            fail = fail_of(served.id, error, f"{where}: {str(error) or 'out of time'}")
        else:
            fail = Fail(served.id, "actor_died", f"{where} crashed: {words_of(error)}")
            if answer:
                served.link.post_fail(fail)
            self._crash(served.actor, error)
            return
        if answer:
            served.link.post_fail(fail)
        else:
            log.warning("%s: a handler ended with an error nobody waits for: %.500r", where, error)


def _what(task: asyncio.Task[Any]) -> str:
    """Return which handler a task runs. Its coroutine knows: to note it elsewhere would cost every message."""
    frame = getattr(task.get_coro(), "cr_frame", None)
    handler = None if frame is None else frame.f_locals.get("handler")
    return f"{task.get_name()}'s {getattr(getattr(handler, 'call', None), '__qualname__', 'handler')}"
