"""What travels on the bus: frozen msgspec Structs, and nothing but data.

A message says by its base class how it is sent and, for asks and streams, what comes back, so that
``await ref.ask(Ping("hi"))`` is typed. Fields are encoded by position (``array_like``): append new ones at
the end, with a default, and never reorder.
"""

from typing import Any, Generic, TypeVar, get_args

import msgspec

R = TypeVar("R")
I = TypeVar("I")  # noqa: E741


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A value that can be sent. Replies and stream items derive from it directly."""


class Tell(Message, frozen=True):
    """A one-way message: no answer, at most once."""


class Ask(Message, Generic[R], frozen=True):
    """A question with exactly one answer of type ``R``, or one error."""


class Stream(Message, Generic[I], frozen=True):
    """A question answered by any number of items of type ``I``, and then exactly one end or error."""


def answer_type(message_type: type) -> Any:
    """Return ``R`` of an ``Ask[R]`` or ``I`` of a ``Stream[I]`` subclass. Raises TypeError where it was not given."""
    for base in message_type.__mro__:
        for original in getattr(base, "__orig_bases__", ()):
            arguments = get_args(original)
            if arguments and not isinstance(arguments[0], TypeVar):
                return arguments[0]
    raise TypeError(
        f"{message_type.__name__} must say what it is answered with: class {message_type.__name__}(Ask[...])"
    )
