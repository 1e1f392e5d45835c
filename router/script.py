"""Loading a router script: found, compiled, run once in a namespace of its own, checked, its options bound.

Everything that can be wrong with a script is said here, with file, line and remedy, before a request meets it.
"""

import difflib
import functools
import hashlib
import inspect
import types
import typing
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from callboard.actors.protocol import Token
from callboard.actors.route_protocol import MOST_SOURCE, MOST_TEXT, ScriptText
from callboard.bus.watchdog import Hung, limited

from .background import Background, background_of
from .errors import ScriptError
from .guest import Guest, guest_of, mark
from .script_trace import line_in as line_in

SHIPPED = Path(__file__).parent / "scripts"
LOAD_S = 10.0
"""How long the code of a script outside of its functions may run."""
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
    source: str
    backgrounds: tuple[Background, ...] = ()
    """Its functions marked with ``@background``, the options bound."""
    number: int = 0
    """Which version of a router's it is."""

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
    hint = f"Did you mean {near[0]!r}? " if near else ""
    remedy = f"{hint}Give a path, or one of {', '.join(names)}"
    raise ScriptError(file=where, line=None, reason="there is no such script", remedy=remedy)


def load_script(where: str, options: Mapping[str, Any] | None = None) -> Script:
    """Load a script with options, given as their types or as strings. Raises ScriptError and has no other effect."""
    return load_text(read_script(where, options))


def read_script(where: str, options: Mapping[str, Any] | None = None) -> ScriptText:
    """Read a script as it is sent to a router. Raises ScriptError; what is in it is not looked at."""
    path = find_script(where)
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ScriptError(file=str(path), line=None, reason=f"it cannot be read: {error.strerror}", remedy="") from None
    if len(source) > MOST_SOURCE:
        reason = f"it has {len(source)} bytes, and a script has at most {MOST_SOURCE}"
        raise ScriptError(file=str(path), line=None, reason=reason, remedy="Import what is long from a module")
    try:
        text = source.decode()
    except UnicodeDecodeError as error:
        line = source[: error.start].count(b"\n") + 1
        raise ScriptError(file=str(path), line=line, reason="it is not UTF-8", remedy="Save it as UTF-8") from None
    return ScriptText(path.stem, str(path), text, dict(options or {}))


def load_text(text: ScriptText) -> Script:
    """Load a script from its text. Raises ScriptError and has no other effect."""
    path = Path(text.path)
    source = text.source.encode()
    if len(source) > MOST_SOURCE:
        reason = f"it has {len(source)} bytes, and a script has at most {MOST_SOURCE}"
        raise ScriptError(file=text.path, line=None, reason=reason, remedy="Import what is long from a module")
    if len(msgspec.json.encode(text.options, enc_hook=str)) > MOST_TEXT:
        raise ScriptError(file=text.path, line=None, reason="its options are too long", remedy="Read them from a file")
    version = hashlib.sha256(source).hexdigest()[:12]
    module = _run(path, text, source, version)
    route = getattr(module, "route", None)
    if route is None:
        raise ScriptError(file=text.path, line=1, reason="it defines no route", remedy=f"Write {EXAMPLE}")
    line = getattr(getattr(route, "__code__", None), "co_firstlineno", 1)
    _check_route(path, line, route)
    works = background_of(module)
    bound = _bind_options(path, line, route, text.options, [work.function for work in works])
    own = _bound_to(route, bound)
    backgrounds = tuple(work.bound(_bound_to(work.function, bound)) for work in works)
    return Script(
        text.name,
        str(path),
        version,
        bound,
        functools.partial(route, **own),
        text.source,
        backgrounds,
        text.number,
    )


def load_in_time(text: ScriptText, *, seconds: float) -> Script:
    """Load a script where all else waits for it; one that takes longer is interrupted. Raises ScriptError."""
    if not seconds:
        return load_text(text)
    try:
        with limited(seconds, guest_of):
            return load_text(text)
    except Hung as hung:  # Also of the watchdog, where that looks already.
        hung.is_told = True
        raise unfinished(text.path, hung.line, hung.seconds) from None


def unfinished(path: str, line: int | None, seconds: float) -> ScriptError:
    """Return the error of a script whose code outside of its functions takes too long."""
    reason = f"its code outside of functions did not end within {seconds:.3g} s"
    return ScriptError(file=path, line=line, reason=reason, remedy="Only definitions and imports belong there")


def _bound_to(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in inspect.signature(function).parameters}


def _run(path: Path, text: ScriptText, source: bytes, version: str) -> types.ModuleType:
    # Not in sys.modules: a script cannot hide a module, and loading it again starts clean.
    module = types.ModuleType(f"callboard_script_{text.name}_{version}")
    module.__file__ = str(path)
    mark(module, Guest(text.name, str(path), text.number))
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


def _bind_options(
    path: Path, line: int, route: Any, given: Mapping[str, Any], works: list[Callable[..., Any]]
) -> dict[str, Any]:
    """Return the options of ``route`` and of the functions that work in the background; equal names share a value."""
    functions = [(route, 2), *((work, 1) for work in works)]
    known = {name: None for each, skip in functions for name in list(inspect.signature(each).parameters)[skip:]}
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            remedy = f"Did you mean {near[0]!r}?" if near else f"Its options: {', '.join(known) or 'none'}"
            raise ScriptError(file=str(path), line=line, reason=f"route has no option {name!r}", remedy=remedy)
    options: dict[str, Any] = {}
    for each, skip in functions:
        at = each.__code__.co_firstlineno
        options = {**_options_of(path, at, each, skip, given), **options}
    return {name: options[name] for name in known}


def _options_of(path: Path, line: int, function: Any, skip: int, given: Mapping[str, Any]) -> dict[str, Any]:
    try:
        kinds = typing.get_type_hints(function)
    except Exception as error:
        reason = f"an annotation of {function.__name__} cannot be resolved: {error}"
        raise ScriptError(file=str(path), line=line, reason=reason, remedy="Import the name it uses") from None
    options: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(function).parameters.items())[skip:]:
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
