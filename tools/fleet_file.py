"""The fleet file: what a fleet is made of, as TOML decoded into Structs, or every problem with its line and remedy.

This file knows the shape (keys and types); what the values must mean together is checked by fleet_check.py.
"""

import difflib
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from .errors import FleetFileError
from .toml_lines import Path as KeyPath
from .toml_lines import TomlLines

Size = str | int
Duration = str | int | float


class Listen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the fleet is reached."""

    http: str = "127.0.0.1:8000"
    frontends: int = 1
    """How many processes serve it. Only one runs in the control process; several have processes of their own, named
    frontend-0, frontend-1, ..., and any may die alone."""
    bus: str = "ipc"
    """``ipc``, or ``tcp://ADDRESS:PORT`` of the control node: other nodes take ports of their own there."""
    keys: str | None = None
    """The directory of the fleet's keys. Without them the bus must not be reachable from other machines."""
    api_keys: str | None = None
    microserving: bool = False
    """Whether HTTP clients may ask engines themselves, as MLC-LLM's router does: under /engines/NAME/microserving."""
    silent: Duration = "5s"
    """A node that is not heard of for so long is cut off by the others, though its process may be alive."""
    stall: Duration = "30s"
    """A request of which nothing is read for so long is cancelled."""


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A served model; its table's name is the OpenAI model name."""

    path: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantize: Literal["none", "int4"] = "none"
    max_model_len: int | None = None


class Tier(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where blocks go that a pool has no room for: memory (each KV manager's own), or a directory (all share it)."""

    kind: Literal["host", "disk"]
    size: Size
    path: str | None = None


class Restart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What happens when a process ends by itself. ``max`` restarts in a row; serving a minute forgives them."""

    policy: Literal["on-failure", "never"] = "on-failure"
    backoff: Duration = "1s"
    max: int = 5


class Kv(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What every KV manager (one per device) gets."""

    size: Size = "1GiB"
    transport: Literal["auto", "shm", "cuda_ipc", "ucx", "inproc"] = "auto"
    wire: Literal["auto", "bfloat16", "float8_e4m3"] = "auto"
    """What pages are converted to for a lane that packs them (ucx); "auto": what they are in the pool they go to."""
    lease: Duration = "10s"
    verify: bool = False
    """Whether pages that arrive from another pool are held against their sender's digests."""
    tiers: tuple[Tier, ...] = ()
    restart: Restart = Restart()


class Defaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of what is made by itself."""

    kv: Kv = Kv()


class Engine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model replica, or ``count`` of them named NAME-0, NAME-1, ..."""

    name: str
    model: str | None = None
    roles: tuple[Literal["prefill", "decode"], ...] = ("prefill", "decode")
    device: str = "cpu"
    host: str = ""
    """The joined host that starts it (``callboard join``); empty: ``callboard up`` does."""
    count: int = 1
    tp: int = 1
    runner: Literal["transformers", "simulated"] = "transformers"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """What it computes in and keeps its KV in; by default what its model's table says."""
    block_size: int = 16
    max_num_batched_tokens: int = 512
    max_num_seqs: int = 64
    restart: Restart = Restart()


class Router(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A router and its script: a path relative to the fleet file, or the name of a shipped one.

    A fleet's only router runs in the control process; of several, each has a process of its own, and may die alone.
    """

    name: str
    script: str
    options: dict[str, Any] = {}
    deadline: Duration = "120s"
    max_queue: int = 256
    patience: Duration = "15s"
    """How long a request waits for an engine, or a router, that is starting or has died; more for models that load
    slowly."""
    hang: Duration = "2s"
    """How long a script may keep all else in its process from going on, until it is interrupted. Two fifths of
    ``silent`` at most: else the others would have cut the process off by then."""
    count: int = 1
    """How many there are of it, named NAME-0, NAME-1, ..."""
    inner: bool = False
    """Whether it is for scripts of other routers alone: the frontend does not ask it."""
    restart: Restart = Restart(backoff="200ms")
    """Of its process, where it has one of its own."""


class UserActor(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"class_path": "class"}):
    """An actor of the user's own: ``class = "module:Class"``, importable from the fleet file's directory."""

    name: str
    class_path: str
    options: dict[str, Any] = {}
    host: str = ""
    restart: Restart = Restart()


class Trace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many requests' records every node remembers, and whether a recording may hold prompts or their hashes."""

    keep: int = 1000
    prompts: Literal["hashed", "full"] = "hashed"


class Log(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the nodes write into their logs. A request that goes well writes nothing at "info"."""

    level: Literal["debug", "info", "warning", "error"] = "info"


class Fleet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole fleet file."""

    version: Literal[1] = 1
    name: str = "default"
    listen: Listen = Listen()
    models: dict[str, Model] = {}
    defaults: Defaults = Defaults()
    engine: tuple[Engine, ...] = ()
    router: tuple[Router, ...] = ()
    actor: tuple[UserActor, ...] = ()
    trace: Trace = Trace()
    log: Log = Log()


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong, where it is, and in the same sentence what to do about it."""

    path: KeyPath
    sentence: str


@dataclass(frozen=True, slots=True)
class FleetFile:
    """A decoded fleet file. ``base`` is the directory that its relative paths start from."""

    fleet: Fleet
    base: Path
    source: str
    lines: TomlLines

    def report(self, problems: list[Problem]) -> None:
        """Raise FleetFileError with ``problems`` and their lines; return if there are none."""
        if problems:
            raise FleetFileError(describe(problems, self.source, self.lines))


def describe(problems: list[Problem], source: str, lines: TomlLines) -> list[str]:
    """Return one line of text per problem, in the order of the file."""
    located = [(lines.line_of(problem.path), problem.sentence) for problem in problems]
    located.sort(key=lambda item: item[0] or 0)
    return [f"{source}:{line}: {text}" if line is not None else f"{source}: {text}" for line, text in located]


def decode_fleet_file(text: str, *, source: str, base: Path) -> FleetFile:
    """Decode a fleet file's text. Raises FleetFileError with every problem of shape, or the TOML syntax error."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FleetFileError([f"{source}: not valid TOML: {str(error)[:1].lower()}{str(error)[1:]}"]) from None
    lines = TomlLines(text)
    problems: list[Problem] = []
    _check_table(document, Fleet, (), problems)
    if problems:
        raise FleetFileError(describe(problems, source, lines))
    return FleetFile(msgspec.convert(document, Fleet), base, source, lines)


def load_fleet_file(path: Path) -> FleetFile:
    """Read and decode the fleet file at ``path``. Raises FleetFileError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FleetFileError([f'there is no fleet file {path}: "callboard init {path}" writes one']) from None
    except (OSError, UnicodeDecodeError) as error:
        raise FleetFileError([f"cannot read the fleet file {path}: {error}"]) from None
    return decode_fleet_file(text, source=str(path), base=path.absolute().parent)


# ---- shape, key by key, so that all problems are found in one go ---------------------------------------------------


def title(path: KeyPath) -> str:
    """Return how a table is written in the file: ``[listen]``, ``[models.smol]``, ``[[engine]]``."""
    names = [part for part in path if isinstance(part, str)]
    if not names:
        return "the top level"
    return f"[[{names[0]}]]" if names[0] in ("engine", "router", "actor") else f"[{'.'.join(names)}]"


def _check_table(value: Any, kind: type[msgspec.Struct], path: KeyPath, problems: list[Problem]) -> None:
    if not isinstance(value, dict):
        problems.append(Problem(path, f"{title(path)} must be a table, not {_article(value)}"))
        return
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    hints = get_type_hints(kind)
    for key, item in value.items():
        if key not in fields:
            problems.append(Problem((*path, key), _unknown(key, fields, path)))
        else:
            _check_value(item, hints[fields[key].name], (*path, key), problems)
    meant = [difflib.get_close_matches(key, fields, n=1, cutoff=0.5) for key in value if key not in fields]
    for key, field in fields.items():
        if field.required and key not in value and [key] not in meant:
            problems.append(Problem(path, f"{title(path)} lacks {key}: {_EXAMPLES.get(key, f'add {key} = ...')}"))


_EXAMPLES = {
    "path": 'add path = "embedded" (or a directory, a .gguf file, a hub id)',
    "name": 'add name = "..."',
    "script": 'add script = "disaggregate" (or a .py file)',
    "class": 'add class = "module:Class"',
    "kind": 'add kind = "disk" (or "host")',
    "size": 'add size = "8GiB"',
}


def _check_value(value: Any, hint: Any, path: KeyPath, problems: list[Problem]) -> None:
    arguments = get_args(hint)
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        _check_table(value, hint, path, problems)
    elif get_origin(hint) in (dict, tuple) and _is_struct(arguments[-1 if get_origin(hint) is dict else 0]):
        _check_tables(value, hint, path, problems)
    else:
        try:
            msgspec.convert(value, hint, strict=True)
        except msgspec.ValidationError:
            problems.append(Problem(path, f"{path[-1]} must be {_wanted(hint)}, not {_article(value)}"))


def _is_struct(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, msgspec.Struct)


def _check_tables(value: Any, hint: Any, path: KeyPath, problems: list[Problem]) -> None:
    name = path[-1]
    if get_origin(hint) is dict:
        if not isinstance(value, dict):
            problems.append(Problem(path, f"{name} must be tables like [{name}.NAME], not {_article(value)}"))
            return
        for key, item in value.items():
            _check_table(item, get_args(hint)[1], (*path, key), problems)
        return
    if not isinstance(value, list):
        names = ".".join(part for part in path if isinstance(part, str))
        problems.append(Problem(path, f"write [[{names}]] with double brackets: there may be several"))
        return
    for index, item in enumerate(value):
        _check_table(item, get_args(hint)[0], (*path, index), problems)


def _unknown(key: str, fields: dict[str, Any], path: KeyPath) -> str:
    near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
    hint = f'did you mean "{near[0]}"?' if near else f"known here: {', '.join(fields)}"
    return f'unknown key "{key}" in {title(path)}: {hint}'


def _wanted(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in arguments)
    if hint == Size:
        return 'a size such as "1GiB" or "80%"'
    if hint == Duration:
        return 'a duration such as "10s"'
    if origin in (Union, UnionType):
        return " or ".join(_wanted(each) for each in arguments if each is not type(None))
    if origin is tuple:
        return f"a list of {_wanted(arguments[0])}"
    if origin is dict:
        return "a table"
    return {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}.get(hint, str(hint))


def _article(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    return "a table" if isinstance(value, dict) else "a list" if isinstance(value, list) else f"{value}"
