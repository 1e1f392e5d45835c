"""How an ask or a stream fails.

BusError
├── Refusal          the far side says no: bad input, no room. It lives on. Subclasses cross the bus with their fields.
│   ├── UnknownActor     nobody of that name on the node
│   ├── NotUnderstood    the actor has no handler for that message, or its fields are of the wrong type
│   └── RemoteError      a refusal whose class this process does not know
├── ActorDied        the far side is known dead: its process ended, or a handler broke and the actor stopped
├── LinkLost         the link broke; what was in flight may or may not have happened
└── AskTimeout       the deadline passed
"""

from typing import Any


class BusError(Exception):
    """Any failure of an ask or a stream."""

    is_relayed = False
    """Whether whoever was asked lives, and says it of somebody it had asked itself."""


class Refusal(BusError):
    """The far side says no and lives on. Give facts by keyword: ``raise OutOfBlocks(needed=8, free=3)``.

    A subclass travels by its name and fields (None, bool, int, float, str, bytes, and lists of them) and arrives
    as itself where the receiving process has imported it, else as RemoteError.
    """

    sentence = "refused"

    def __init__(self, **fields: Any) -> None:
        self.fields = fields
        super().__init__(self.describe(fields))

    def describe(self, fields: dict[str, Any]) -> str:
        """Return the sentence for people, made of the class's ``sentence`` and the fields."""
        return self.sentence.format(**fields)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["fields"][name]
        except KeyError:
            raise AttributeError(name) from None


class UnknownActor(Refusal):
    """Nobody of that name on the node."""

    sentence = "there is no actor {actor!r} on node {node!r}"


class NotUnderstood(Refusal):
    """The actor has no handler for the message, or a field is of the wrong type."""

    sentence = "{actor} does not understand this message: {reason}"


class RemoteError(Refusal):
    """A refusal of a class this process does not know."""

    sentence = "{name}: {text}"


class ActorDied(BusError):
    """The far side is known dead: what was asked of it will not happen any more."""


class LinkLost(BusError):
    """The link to the far side broke: what was in flight may or may not have happened."""


class AskTimeout(BusError, TimeoutError):
    """The deadline passed before the answer came."""


def refusal_from_wire(name: str, fields: dict[str, Any], text: str) -> Refusal:
    """Rebuild a Refusal from its class name and fields, as RemoteError where the class is unknown here."""
    pending: list[type[Refusal]] = [Refusal]
    while pending:
        candidate = pending.pop()
        if candidate.__name__ == name:
            try:
                return candidate(**fields)
            except Exception:  # The class's own code, on fields that another process gave: it may raise anything.
                break
        pending.extend(candidate.__subclasses__())
    return RemoteError(name=name, text=text)


def words_of(error: BaseException) -> str:
    """Return an error's type and text, for people; an exception of somebody's own may not even tell its text."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__
