"""The shape of a fleet to be simulated: who is in it, on which node, with how many blocks and at what limits."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from callboard.actors.protocol import Entry, KvAddr
from callboard.bus.taps import ENDED, SENT, SPAN, decode_facts
from callboard.kv.layout import KvLayout
from callboard.tools.errors import CliError
from callboard.tools.trace.event import Event

CONTROL = "control"
LEAST_BLOCKS = 2
MOST_BLOCKS = 4_000_000
MOST_ENGINES = 10_000


@dataclass(frozen=True, slots=True)
class EngineShape:
    """An engine, and the limits of its steps."""

    name: str
    node: str
    model: str
    roles: tuple[str, ...]
    manager: str
    device: str = "cpu"
    max_num_batched_tokens: int = 512
    max_num_seqs: int = 64
    max_model_len: int | None = None


@dataclass(frozen=True, slots=True)
class ManagerShape:
    """A KV manager and its pool."""

    name: str
    node: str
    num_blocks: int


@dataclass(frozen=True, slots=True)
class RouterShape:
    """A router and what it runs."""

    name: str
    node: str
    script: str
    version: str = ""
    """Of the script, as it was recorded; empty where it is not known."""
    options: dict[str, Any] = field(default_factory=dict)
    deadline_s: float = 120.0
    max_queue: int = 256


@dataclass(frozen=True, slots=True)
class Shape:
    """A whole fleet."""

    engines: tuple[EngineShape, ...]
    managers: tuple[ManagerShape, ...]
    routers: tuple[RouterShape, ...]
    block_size: int = 16
    token_bytes: int | None = None
    """Of a token's KV; None where it is not known."""
    guesses: tuple[str, ...] = ()
    """What the recording did not say, and what was taken for it."""


class ShapeOf:
    """Fed with a recording's events and views; ``shape`` then says what fleet it was."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._layout: KvLayout | None = None
        self._sent_bytes: dict[int, int] = {}
        self._token_bytes: dict[int, int] = {}
        self._options: dict[str, tuple[str, str]] = {}

    @property
    def engines(self) -> tuple[Entry, ...]:
        """All engines that were seen, ordered by name."""
        return self._of("engine")

    def _of(self, kind: str) -> tuple[Entry, ...]:
        return tuple(self._entries[name] for name in sorted(self._entries) if self._entries[name].kind == kind)

    def see(self, entries: Iterable[Entry]) -> None:
        """Take a view of the directory."""
        self._entries |= {entry.name: entry for entry in entries}

    def add(self, event: Event) -> None:
        """Take what an event says of the fleet."""
        record = event.record
        if record.name == "RemoteSend":
            if record.what == SENT:
                self._see_send(event)
            elif record.what == ENDED and (num := self._sent_bytes.pop(record.span, 0)):
                num_bytes = decode_facts(record.facts).get("num_bytes")
                if isinstance(num_bytes, int) and num_bytes > 0 and not num_bytes % num:
                    self._token_bytes[num_bytes // num] = self._token_bytes.get(num_bytes // num, 0) + 1
        elif record.what == SPAN and record.name == "attempt":
            facts = decode_facts(record.facts)
            self._options[record.actor] = (str(facts.get("version", "")), str(facts.get("options", "")))

    def _see_send(self, event: Event) -> None:
        facts = decode_facts(event.record.facts)
        begin, end = facts.get("begin"), facts.get("end")
        if isinstance(begin, int) and isinstance(end, int) and end > begin:
            self._sent_bytes[event.record.span] = end - begin
        if self._layout is None and bytes(event.record.body) != b"\xc0":
            try:
                self._layout = _decode_send(event.record.body).kv.layout
            except (msgspec.MsgspecError, RecursionError):
                pass

    # ---- what fleet it was ---------------------------------------------------------------------------------------

    def shape(self) -> Shape:
        """Return the fleet. Raises CliError where the recording does not know one."""
        engines = [entry for entry in self.engines if entry.manager is not None]
        if not engines:
            raise CliError("the recording knows no engines: give a fleet file, as in --simulate fleet.toml")
        if len(engines) > MOST_ENGINES:
            raise CliError(f"the recording knows {len(engines)} engines, more than a simulation can have")
        guesses: list[str] = []
        block_size = self._block_size(engines, guesses)
        managers = self._managers(engines, guesses)
        routers = tuple(self._router(entry) for entry in self._of("router"))
        if not routers:
            raise CliError("the recording knows no router: give a fleet file, as in --simulate fleet.toml")
        token_bytes = max(self._token_bytes, key=lambda size: self._token_bytes[size], default=None)
        if token_bytes is None and self._layout is not None:
            token_bytes = self._layout.token_bytes
        shapes = tuple(_engine(entry) for entry in engines)
        if any("max_num_seqs" not in entry.detail for entry in engines):
            guesses.append("the engines' limits are taken to be the default ones")
        return Shape(shapes, managers, routers, block_size, token_bytes, tuple(guesses))

    def _block_size(self, engines: list[Entry], guesses: list[str]) -> int:
        said = {_int(entry.detail.get("block_size")) for entry in engines} - {None}
        if len(said) > 1:
            raise CliError("the engines of the recording have blocks of several sizes, which is not simulated yet")
        for size in said:
            if size is not None and 1 <= size <= 4096:
                return size
        if self._layout is not None and 1 <= self._layout.block_size <= 4096:
            return self._layout.block_size
        guesses.append("blocks are taken to hold 16 tokens")
        return 16

    def _managers(self, engines: list[Entry], guesses: list[str]) -> tuple[ManagerShape, ...]:
        found: dict[str, ManagerShape] = {}
        for entry in engines:
            assert entry.manager is not None
            name = entry.manager.actor
            known = self._entries.get(name)
            num = max(entry.load.num_blocks, 0 if known is None else known.load.num_blocks)
            if not LEAST_BLOCKS <= num <= MOST_BLOCKS:
                num = 4096
                guesses.append(f"{name} is taken to have {num} blocks")
            found.setdefault(name, ManagerShape(name, entry.manager.node, num))
        return tuple(found[name] for name in sorted(found))

    def _router(self, entry: Entry) -> RouterShape:
        version, options = self._options.get(entry.name, ("", ""))
        try:
            decoded = msgspec.json.decode(options, type=dict[str, Any]) if options else {}
        except msgspec.MsgspecError:
            decoded = {}
        detail = entry.detail
        script = detail.get("path") or detail.get("script") or "least_loaded"
        version = version or detail.get("version", "")
        return RouterShape(entry.name, entry.address.node, script, version, decoded)


class _SendBody(msgspec.Struct):
    kv: KvAddr


_decode_send = msgspec.msgpack.Decoder(_SendBody).decode


def _engine(entry: Entry) -> EngineShape:
    assert entry.manager is not None
    detail = entry.detail
    return EngineShape(
        entry.name,
        entry.address.node,
        entry.model,
        entry.roles,
        entry.manager.actor,
        entry.device,
        _int(detail.get("max_num_batched_tokens")) or 512,
        _int(detail.get("max_num_seqs")) or 64,
        _int(detail.get("max_model_len")),
    )


def _int(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 10 else None
