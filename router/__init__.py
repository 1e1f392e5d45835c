"""What a router script sees. ``callboard.router.actor`` runs the scripts."""

from collections.abc import AsyncGenerator

from callboard.actors.move_protocol import Moved, NotMovable
from callboard.actors.protocol import Load, SamplingParams, Sent, Token
from callboard.bus import ActorDied, AskTimeout, LinkLost
from callboard.kv.layout import BadRange, OutOfBlocks

from .background import background
from .engine import Engine
from .errors import NoEngine, NoRouter, QueueFull, ScriptError
from .events import EventKind
from .fleet import EngineEvent, Engines, Fleet, best_match, cheapest, least_loaded
from .generation import Generation
from .peer import HandedOn, Peer
from .prediction import Plan, Prediction, best_plan, predict
from .prefix import Prefix
from .request import Request
from .reservation import Reserved

Tokens = AsyncGenerator[Token, None]
"""What ``route`` returns by yielding."""

__all__ = [
    "ActorDied",
    "AskTimeout",
    "BadRange",
    "Engine",
    "EngineEvent",
    "Engines",
    "EventKind",
    "Fleet",
    "Generation",
    "HandedOn",
    "LinkLost",
    "Load",
    "Moved",
    "NoEngine",
    "NoRouter",
    "NotMovable",
    "OutOfBlocks",
    "Peer",
    "Plan",
    "Prediction",
    "Prefix",
    "QueueFull",
    "Request",
    "Reserved",
    "SamplingParams",
    "ScriptError",
    "Sent",
    "Token",
    "Tokens",
    "background",
    "best_match",
    "best_plan",
    "cheapest",
    "least_loaded",
    "predict",
]
