"""Errors as the frames that carry them, and back."""

from .errors import ActorDied, AskTimeout, BusError, LinkLost, Refusal, refusal_from_wire
from .frames import Fail

RELAYED = "relayed"
"""The name in a Fail frame of an error that is no refusal: it is said of somebody else than the sender, who lives."""


def fail_of(call_id: int, error: BusError | TimeoutError, text: str = "") -> Fail:
    """Return the frame that stands for an error, which is not the end of whoever sends it."""
    if isinstance(error, Refusal):
        return Fail(call_id, "refusal", str(error), type(error).__name__, error.fields)
    known = ((TimeoutError, "timeout"), (LinkLost, "link_lost"), (BusError, "actor_died"))
    kind = next(name for each, name in known if isinstance(error, each))
    return Fail(call_id, kind, text or str(error), RELAYED)


def error_of(frame: Fail) -> BusError:
    """Return the error a Fail frame stands for."""
    if frame.kind == "refusal":
        return refusal_from_wire(frame.name, frame.fields, frame.text)
    error: BusError = {"actor_died": ActorDied, "timeout": AskTimeout}.get(frame.kind, LinkLost)(frame.text)
    error.is_relayed = frame.name == RELAYED
    return error
