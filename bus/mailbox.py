"""An actor's door: which messages it takes, and with which handler.

A handler is a method ``on_*`` with one parameter annotated with the message it takes: a plain function (run on the
loop at once: keep it quick), a coroutine (a task of its own), or an async generator (a stream). Anything that is not
one of these messages is refused here and never reaches the actor.
"""

import functools
import inspect
import operator
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from .errors import NotUnderstood
from .frames import ASK, STREAM, TELL
from .messages import Ask, Stream, Tell


@dataclass(frozen=True, slots=True)
class Handler:
    """A bound method and how to run it."""

    call: Callable[[Any], Any]
    kind: int
    """TELL, ASK or STREAM"""
    is_task: bool
    """A coroutine or a stream, not a plain function."""


class Mailbox:
    """The handlers of one actor, by message type. Raises TypeError for a handler that is not well formed."""

    def __init__(self, name: str, actor: object, dec_hook: Callable[[type, Any], Any]) -> None:
        self.name = name
        self.actor = actor
        self.handlers: dict[type, Handler] = {}
        for attribute in sorted(dir(type(actor))):
            if attribute.startswith("on_"):
                self._add(attribute)
        if not self.handlers:
            self._decode: Any = None
            return
        union = functools.reduce(operator.or_, self.handlers)
        self._decode = msgspec.msgpack.Decoder(union, dec_hook=dec_hook).decode

    def _add(self, attribute: str) -> None:
        method = getattr(self.actor, attribute)
        where = f"{type(self.actor).__name__}.{attribute}"
        parameters = [p for p in inspect.signature(method).parameters.values() if p.default is p.empty]
        if len(parameters) != 1:
            raise TypeError(f"{where} must take one message")
        message = typing.get_type_hints(method).get(parameters[0].name)
        if not (isinstance(message, type) and issubclass(message, (Tell, Ask, Stream))):
            raise TypeError(f"{where} must annotate its parameter with a Tell, Ask or Stream message")
        if message in self.handlers:
            raise TypeError(f"{where}: {message.__name__} has a handler already")
        is_stream = inspect.isasyncgenfunction(method)
        if is_stream != issubclass(message, Stream):
            raise TypeError(f"{where}: a Stream is served by an async generator, and only a Stream is")
        kind = STREAM if is_stream else ASK if issubclass(message, Ask) else TELL
        self.handlers[message] = Handler(method, kind, is_stream or inspect.iscoroutinefunction(method))

    def open(self, body: Any) -> tuple[Any, Handler]:
        """Return the message in ``body`` and its handler. Raises NotUnderstood."""
        if type(body) is msgspec.Raw:
            if self._decode is None:
                raise NotUnderstood(actor=self.name, reason="it takes no messages")
            try:
                message = self._decode(body)
            except Exception as error:  # A message's own __post_init__ may raise anything.
                raise NotUnderstood(actor=self.name, reason=str(error) or type(error).__name__) from None
            return message, self.handlers[type(message)]
        handler = self.handlers.get(type(body))
        if handler is None:
            raise NotUnderstood(actor=self.name, reason=f"it has no handler for {type(body).__name__}")
        return body, handler
