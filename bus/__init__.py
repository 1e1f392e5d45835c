"""The message bus: actors on nodes, messages over links."""

from .address import Address
from .calls import FOREVER, Call, current_call
from .clock import Clock, VirtualClock
from .errors import ActorDied, AskTimeout, BusError, LinkLost, NotUnderstood, Refusal, RemoteError, UnknownActor
from .links import LinkConfig
from .messages import Ask, Message, Stream, Tell
from .node import Node
from .ref import Items, Ref
from .taps import TapRecord, Trace

__all__ = [
    "FOREVER",
    "ActorDied",
    "Address",
    "Ask",
    "AskTimeout",
    "BusError",
    "Call",
    "Clock",
    "Items",
    "LinkConfig",
    "LinkLost",
    "Message",
    "Node",
    "NotUnderstood",
    "Ref",
    "Refusal",
    "RemoteError",
    "Stream",
    "TapRecord",
    "Tell",
    "Trace",
    "UnknownActor",
    "VirtualClock",
    "current_call",
]
