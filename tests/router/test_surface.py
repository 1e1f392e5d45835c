"""The whole surface that a script sees: typed without gaps, and documented, so that an editor can complete it."""

import inspect
import typing
from typing import Any

import callboard.router as surface

OURS = "callboard.router"
TYPES = [getattr(surface, name) for name in surface.__all__ if inspect.isclass(getattr(surface, name))]


def callables() -> list[tuple[str, Any]]:
    """Return every function and public method of the surface, properties as their getters."""
    found = [(name, getattr(surface, name)) for name in surface.__all__ if inspect.isfunction(getattr(surface, name))]
    for kind in TYPES:
        if kind.__module__.startswith(OURS) and not issubclass(kind, BaseException):
            for name, member in vars(kind).items():
                function = member.fget if isinstance(member, property) else member
                if not name.startswith("_") and inspect.isfunction(function):
                    found.append((f"{kind.__name__}.{name}", function))
    return found


def mentions_any(hint: Any) -> bool:
    return hint is Any or any(mentions_any(part) for part in typing.get_args(hint))


def test_every_call_of_the_surface_is_typed_and_documented() -> None:
    assert len(callables()) > 30
    for name, function in callables():
        hints = typing.get_type_hints(function, {**vars(surface), **function.__globals__})
        parameters = [each for each in inspect.signature(function).parameters if each != "self"]
        assert {*parameters, "return"} == set(hints), name
        assert not [each for each, hint in hints.items() if mentions_any(hint)], name
        assert inspect.getdoc(function), name


def test_every_type_of_the_surface_is_documented() -> None:
    for kind in TYPES:
        assert inspect.getdoc(kind), kind


def test_what_is_named_is_there_once_and_in_order() -> None:
    assert list(surface.__all__) == sorted(set(surface.__all__))
