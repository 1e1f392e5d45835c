"""Loading a router script: found, compiled, run once in a namespace of its own, checked, its options bound.

Everything that can be wrong with a script is said here, with file, line and remedy, before a request meets it.
"""

import difflib
import functools
import hashlib
import inspect
import traceback
import types
import typing
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from callboard.actors.protocol import Token

from .errors import ScriptError

SHIPPED = Path(__file__).parent / "scripts"
MOST_SHOWN = 1000
"""Characters of the options that a record keeps."""
EXAMPLE = "async def route(request: Request, fleet: Fleet, *, ratio: float = 0.2):"


@dataclass(frozen=True, slots=True)
class Script:
    """A loaded script. ``route(request, fleet)`` has the options bound; two loads share no state."""

    name: str
    path: str
    version: str
    """The first digits of the text's SHA-256."""
    options: dict[str, Any]
    """All options, defaults included, as their types."""
    route: Callable[..., AsyncGenerator[Token, None]]

    @property
    def shown_options(self) -> str:
        """The options as JSON; empty where that is too long to be kept with every request."""
        text = msgspec.json.encode(self.options, enc_hook=str).decode()
        return text if len(text) <= MOST_SHOWN else ""


def shipped_scripts() -> list[str]:
    """Return the names of the scripts that ship."""
    return sorted(path.stem for path in SHIPPED.glob("*.py") if path.stem != "__init__")


def find_script(where: str) -> Path:
    """Return the file of a script given by path or by a shipped name. Raises ScriptError."""
    names = shipped_scripts()
    if where in names:
        return SHIPPED / f"{where}.py"
    path = Path(where).expanduser()
    if path.is_file():
        return path
    near = difflib.get_close_matches(where, names, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    remedy = f"{hint}Give a path, or one of {', '.join(names)}"
    raise ScriptError(file=where, line=None, reason="there is no such script", remedy=remedy)


def load_script(where: str, options: Mapping[str, Any] | None = None) -> Script:
    """Load a script with options, given as their types or as strings. Raises ScriptError and has no other effect."""
    path = find_script(where)
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ScriptError(file=str(path), line=None, reason=f"it cannot be read: {error.strerror}", remedy="") from None
    version = hashlib.sha256(source).hexdigest()[:12]
    module = _run(path, source, version)
    route = getattr(module, "route", None)
    if route is None:
        raise ScriptError(file=str(path), line=1, reason="it defines no route", remedy=f"Write {EXAMPLE}")
    line = getattr(getattr(route, "__code__", None), "co_firstlineno", 1)
    _check_route(path, line, route)
    bound = _bind_options(path, line, route, options or {})
    return Script(path.stem, str(path), version, bound, functools.partial(route, **bound))


def line_in(path: str, error: BaseException) -> int | None:
    """Return the innermost line of a script in an exception's traceback, None if it is not in it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return lines[-1] if lines else None


def _run(path: Path, source: bytes, version: str) -> types.ModuleType:
    # Not in sys.modules: a script cannot hide a module, and loading it again starts clean.
    module = types.ModuleType(f"callboard_script_{path.stem}_{version}")
    module.__file__ = str(path)
    try:
        code = compile(source, str(path), "exec", dont_inherit=True)
        exec(code, module.__dict__)
    except SyntaxError as error:
        line, remedy = error.lineno, f"Correct it: {error.text.strip()!r}" if error.text else ""
        raise ScriptError(file=str(path), line=line, reason=f"syntax error: {error.msg}", remedy=remedy) from None
    except (Exception, SystemExit) as error:
        reason = f"it fails while it is loaded: {type(error).__name__}: {error}"
        remedy = "Only definitions and imports belong outside of route"
        raise ScriptError(file=str(path), line=line_in(str(path), error), reason=reason, remedy=remedy) from error
    return module


def _check_route(path: Path, line: int, route: Any) -> None:
    reason = None
    if not callable(route):
        reason = f"route is a {type(route).__name__} and not a coroutine"
    elif inspect.iscoroutinefunction(route):
        reason = "route never yields"
    elif not inspect.isasyncgenfunction(route):
        reason = "route is not asynchronous"
    if reason is not None:
        remedy = (
            f"Write {EXAMPLE} and yield every token: async for token in engine.start_generate(request): yield token"
        )
        raise ScriptError(file=str(path), line=line, reason=reason, remedy=remedy)
    parameters = list(inspect.signature(route).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 2:
        reason = "route must take the request and the fleet as its first two parameters"
        raise ScriptError(file=str(path), line=line, reason=reason, remedy=f"Write {EXAMPLE}")
    variadic = [p.name for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if variadic:
        reason = f"route takes *{variadic[0]}: options could not be checked"
        raise ScriptError(file=str(path), line=line, reason=reason, remedy="Name every option")


def _bind_options(path: Path, line: int, route: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    parameters = dict(list(inspect.signature(route).parameters.items())[2:])
    for name in given:
        if name not in parameters:
            near = difflib.get_close_matches(name, parameters, 1)
            known = ", ".join(parameters) or "none"
            remedy = f"Did you mean {near[0]!r}?" if near else f"Its options: {known}"
            raise ScriptError(file=str(path), line=line, reason=f"route has no option {name!r}", remedy=remedy)
    try:
        kinds = typing.get_type_hints(route)
    except Exception as error:
        reason = f"an annotation of route cannot be resolved: {error}"
        raise ScriptError(file=str(path), line=line, reason=reason, remedy="Import the name it uses") from None
    options: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if name in given:
            options[name] = _convert(path, line, name, given[name], _kind(kinds.get(name), parameter.default))
        elif parameter.default is not parameter.empty:
            options[name] = parameter.default
        else:
            remedy = f"Set it: --set {name}=..., or give it a default"
            raise ScriptError(file=str(path), line=line, reason=f"option {name!r} has no value", remedy=remedy)
    return options


def _kind(annotation: Any, default: Any) -> Any:
    """Return an option's type: as annotated, else its default's."""
    if annotation is not None:
        return annotation
    return type(default) if type(default) in (bool, int, float, str) else Any


def _convert(path: Path, line: int, name: str, value: Any, kind: Any) -> Any:
    try:
        return msgspec.convert(value, kind, strict=False)
    except (msgspec.ValidationError, TypeError) as error:
        wanted = getattr(kind, "__name__", str(kind))
        reason = f"option {name!r} cannot be {value!r}: {error}"
        raise ScriptError(file=str(path), line=line, reason=reason, remedy=f"Give a value of type {wanted}") from None
