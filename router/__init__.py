"""What a router script sees. ``callboard.router.actor`` runs the scripts."""

from collections.abc import AsyncGenerator

from callboard.actors.protocol import Load, SamplingParams, Sent, Token
from callboard.bus import ActorDied, AskTimeout, LinkLost
from callboard.kv.layout import BadRange, OutOfBlocks

from .engine import Engine
from .errors import NoEngine, QueueFull, ScriptError
from .fleet import Engines, Fleet, best_match, least_loaded
from .generation import Generation
from .request import Request
from .reservation import Reserved

Tokens = AsyncGenerator[Token, None]
"""What ``route`` returns by yielding."""

__all__ = [
    "ActorDied",
    "AskTimeout",
    "BadRange",
    "Engine",
    "Engines",
    "Fleet",
    "Generation",
    "LinkLost",
    "Load",
    "NoEngine",
    "OutOfBlocks",
    "QueueFull",
    "Request",
    "Reserved",
    "SamplingParams",
    "ScriptError",
    "Sent",
    "Token",
    "Tokens",
    "best_match",
    "least_loaded",
]
