"""Where in a script something went wrong: its own frames, with the source as it was loaded, before all others."""

import asyncio
import traceback

from callboard.actors.route_protocol import MOST_TEXT
from callboard.bus import BusError
from callboard.bus.errors import words_of
from callboard.bus.watchdog import Hung

from .errors import ScriptError

MOST_FRAMES = 20


def line_in(path: str, error: BaseException) -> int | None:
    """Return the innermost line of a script in an exception's traceback, None if it is not in it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return lines[-1] if lines else None


def first_cause(error: BaseException) -> BaseException:
    """Return the error that counts: of several raised together an interruption, or else the first from the bus."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    causes = [first_cause(inner) for inner in error.exceptions]
    for kind in (Hung, BusError):
        for cause in causes:
            if isinstance(cause, kind):
                return cause
    return causes[0]


def trace_of(path: str, source: str, error: BaseException) -> str:
    """Return the script's frames in an exception's traceback, outermost first, and what was raised.

    One line for each: ``file:line in function: source line``. The source is the script's as it was loaded: the file
    may be another one by now, or on another machine.
    """
    lines, found = source.splitlines(), []
    chain = _chain(error)
    for each in chain:
        frames = [frame for frame in traceback.extract_tb(each.__traceback__) if frame.filename == path]
        for frame in frames[-MOST_FRAMES:]:
            number = frame.lineno or 0
            text = lines[number - 1].strip() if 0 < number <= len(lines) else ""
            found.append(f"{path}:{number} in {frame.name}: {text}")
        if frames:
            break
    last = chain[0]
    words = str(last) if isinstance(last, ScriptError) else words_of(last)
    return "\n".join([*found, words])[:MOST_TEXT]


def is_being_cancelled() -> bool:
    """Return whether the present task is cancelled from outside, and not just by what it waited for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def in_one_line(trace: str) -> str:
    """Return a traceback as a log's line has it."""
    return "; ".join(trace.splitlines())


def _chain(error: BaseException) -> list[BaseException]:
    """Return the error that counts, and what it was raised from."""
    chain: list[BaseException] = []
    current: BaseException | None = first_cause(error)
    while current is not None and current not in chain and len(chain) < MOST_FRAMES:
        chain.append(current)
        inner = current.__cause__ or current.__context__
        current = None if inner is None else first_cause(inner)
    return chain
