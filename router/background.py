"""``@background``: marks work that a script does beside its requests (background_work.py runs it)."""

import functools
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, TypeVar

MARK = "__callboard_background__"

F = TypeVar("F", bound=Callable[..., Coroutine[Any, Any, None]])


def background(*, every: float | None = None) -> Callable[[F], F]:
    """Mark ``async def name(fleet: Fleet)`` of a script: it runs while the script is active, and is cancelled with it.

    It runs once, or again ``every`` so many seconds after it has ended; after an exception it is started again in any
    case. What it took and did not give back comes back at the end of each run. Keyword parameters are options, as
    those of ``route``: one of the same name has the same value. Raises ValueError, TypeError.
    """
    if every is not None and (isinstance(every, bool) or not isinstance(every, int | float)):
        raise TypeError("write @background() or @background(every=1.0)")
    if every is not None and not 0 < every < float("inf"):
        raise ValueError(f"every={every!r} is no number of seconds above 0")

    def mark(function: F) -> F:
        name = getattr(function, "__name__", "it")
        if not inspect.iscoroutinefunction(function):
            raise TypeError(f"@background takes a coroutine: write async def {name}(fleet: Fleet)")
        parameters = inspect.signature(function).parameters.values()
        if not any(each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD) for each in parameters):
            raise TypeError(f"{name} must take the fleet: write async def {name}(fleet: Fleet)")
        setattr(function, MARK, (every,))
        return function

    return mark


@dataclass(frozen=True, slots=True)
class Background:
    """One function of a loaded script that is marked."""

    name: str
    every_s: float | None
    """None: once."""
    function: Callable[..., Awaitable[None]]

    def bound(self, options: Mapping[str, Any]) -> "Background":
        """Return the same with its options bound."""
        return replace(self, function=functools.partial(self.function, **options))


def background_of(module: ModuleType) -> list[Background]:
    """Return what a script marks, in the order it was written; what it imported is not its own."""
    return [
        Background(name, getattr(value, MARK)[0], value)
        for name, value in vars(module).items()
        if inspect.iscoroutinefunction(value) and hasattr(value, MARK) and value.__module__ == module.__name__
    ]
