"""Lines of text: a row per message or phase, in columns, with a colour per request where there are colours."""

import time
import zlib
from collections.abc import Iterable

from callboard.actors.protocol import Entry
from callboard.bus.taps import SPAN
from callboard.router.spans import request_of
from callboard.tools.units import format_size

from .notice import Notice
from .past import bare_id
from .phrases import phrase, seconds
from .story import VERBS
from .told import MESSAGES, Reader, Told

NUM_ID, NUM_SHORT = 10, 8
"""Characters of a request's id that are shown, and of a longer one: enough to name it by."""
COLORS = (39, 208, 77, 205, 178, 141, 44, 203, 113, 111, 215, 170)
"""Of the 256, such as are legible on dark and on light ground, and unlike their neighbours here."""
TINY_S = 1e-3
"""Phases are shown from this length on,"""
LOUD = frozenset(("http", "prefill", "decode", "compute", "attempt", "reroute"))
"""these however short,"""
SMALL_S = 10e-3
"""and what a sub-request is made of from this length on."""
INNER = MESSAGES - {*VERBS, "generate"}
"""Messages that a sub-request is made of."""
KINDS = {"router": "router", "engine": "engine", "kv_manager": "KV manager", "actor": "actor"}
WIDE, NARROW = 140, 100
"""Columns of a terminal: below the one there are no columns for what the words say, too; below the other lines wrap."""
RESET, BOLD, DIM, RED, YELLOW = "\x1b[0m", "\x1b[1m", "\x1b[2m", "\x1b[31m", "\x1b[33m"


class Table:
    """Makes lines. ``names`` are those of the actors, as far as known; ``width`` cuts lines off, None does not."""

    def __init__(
        self,
        reader: Reader,
        names: Iterable[str],
        *,
        has_colors: bool,
        is_ascii: bool,
        everything: bool,
        width: int | None = None,
    ) -> None:
        self._reader = reader
        self._name_width = min(20, max([len("directory"), *map(len, names)]))
        self._has_colors = has_colors
        self._arrows = ("->", "<-", "") if is_ascii else ("→", "←", "")
        self._dots = "~" if is_ascii else "…"
        self._everything = everything
        self._is_narrow = width is not None and width < WIDE
        self._width = None if width is None or width < NARROW else width

    def header(self) -> str:
        """Return the titles of the columns."""
        wide = self._name_width
        at = f"{'FROM':<{wide}}   {'TO':<{wide}}"
        amounts = "" if self._is_narrow else f"{'TOKENS':>6} {'BYTES':>9} "
        return self._paint(f"{'TIME':<12} {'REQUEST':<{NUM_ID}} {at} {'MESSAGE':<17} {amounts}{'TOOK':>7}", BOLD)

    def cast(self, entries: Iterable[Entry]) -> str:
        """Return a line that says who is who."""
        by_kind: dict[str, list[str]] = {}
        for entry in entries:
            by_kind.setdefault(entry.kind, []).append(entry.name)
        parts = [
            f"{title if len(by_kind[kind]) == 1 else title + 's'} {', '.join(sorted(by_kind[kind]))}"
            for kind, title in KINDS.items()
            if kind in by_kind and by_kind[kind] != [title]
        ]
        return self._paint("-- " + "; ".join(parts), DIM) if parts else ""

    def is_shown(self, told: Told) -> bool:
        """Say whether something has a line at all."""
        if not told.is_begin and not told.is_end:
            return False
        if self._everything or told.error:
            return True
        if told.event.record.what == SPAN:
            return told.verb in LOUD or (told.took_s or 0.0) >= TINY_S
        is_slow = told.is_end and (told.took_s or 0.0) >= SMALL_S and told.verb != "compute_kv"  # Its phases say more.
        return told.verb not in INNER or is_slow

    def line(self, told: Told) -> str:
        """Return the line of a message, an end, or a phase."""
        record = told.event.record
        forth, back, none = self._arrows
        arrow = none if not told.target else forth if not told.is_end else back
        wide = self._name_width
        when, request = clock_text(told.event.wall), f"{short_id(record.request_id):<{NUM_ID}}"
        who = f"{_cut(told.source, wide):<{wide}} {arrow:<{len(forth)}} {_cut(told.target, wide):<{wide}}"
        what = f"{'  ' * told.depth + told.verb:<17}"
        took = f"{'' if told.took_s is None else seconds(told.took_s):>7}"
        rest = "" if self._is_narrow else f"{_number(tokens_of(told)):>6} {_size(bytes_of(told)):>9} "
        rest += f"{took}  {phrase(told, self._reader)}"
        if self._width is not None:
            room = self._width - len(when) - len(request) - len(who) - len(what) - 4
            rest = rest if len(rest) <= room else rest[: room - 1] + self._dots
        if not self._has_colors:
            return f"{when} {request} {who} {what} {rest}".rstrip()
        is_inner = (record.what == SPAN and told.verb != "http") or told.verb in INNER
        tone = RED if told.error else DIM if is_inner else ""
        color = f"\x1b[38;5;{color_of(record.request_id)}m"
        verb = self._paint(what, tone if told.is_end else tone or BOLD)
        return f"{DIM}{when}{RESET} {color}{request}{RESET} {self._paint(who, tone)} {verb} {self._paint(rest, tone)}"

    def notice(self, notice: Notice) -> str:
        """Return the line of a notice."""
        tone = DIM if notice.kind in ("following", "came", "back", "stopped", "ended") else YELLOW
        return self._paint(f"{clock_text(notice.wall)}  -- {notice.text}", tone)

    def _paint(self, text: str, tone: str) -> str:
        return f"{tone}{text}{RESET}" if self._has_colors and tone and text else text


def clock_text(wall: float) -> str:
    """Return a local time with milliseconds."""
    whole = int(wall)
    return time.strftime("%H:%M:%S", time.localtime(whole)) + f".{int((wall - whole) * 1000):03d}"


def short_id(request_id: str) -> str:
    """Return the beginning of a request's id, and which of its sequences this is."""
    root = request_of(request_id)
    bare = bare_id(root)
    return (bare if len(bare) <= NUM_ID else bare[:NUM_SHORT]) + request_id[len(root) :]


def color_of(request_id: str) -> int:
    """Return the colour of a request, of the 256: always the same one."""
    return COLORS[zlib.crc32(request_of(request_id).encode()) % len(COLORS)]


def tokens_of(told: Told) -> int | None:
    """Return how many tokens a line is about, None if about none."""
    record, facts = told.event.record, told.facts
    if told.verb == "remote_send" and told.is_end:
        parts = facts.get("num_computed_tokens"), facts.get("num_reused_tokens")
        number = parts[0] + parts[1] if isinstance(parts[0], int) and isinstance(parts[1], int) else None
    elif told.verb in ("generate", "start_generate") and told.is_end:
        number = record.num_items
    else:
        number = facts.get("num_tokens")
    return number if isinstance(number, int) else None


def bytes_of(told: Told) -> int | None:
    """Return how many bytes a line is about: of the message or its answer, of a remote_send those of the KV."""
    number = told.facts.get("num_bytes", told.event.record.num_bytes)
    return number if isinstance(number, int) and number else None


def _number(value: int | None) -> str:
    return "" if value is None else str(value)


def _size(value: int | None) -> str:
    return "" if value is None else format_size(value)


def _cut(name: str, width: int) -> str:
    return name if len(name) <= width else name[: width - 1] + "~"
