"""Engines of a running fleet by their names, and a word to the launcher whose processes they are."""

import difflib

from callboard.actors.protocol import Entry
from callboard.bus import BusError

from .bus_client import list_entries, why_not
from .errors import CliError
from .launcher_calls import KeepEngine, call_launcher, launcher_of
from .running import RunningFleet


def entries_of(fleet: RunningFleet) -> tuple[Entry, ...]:
    """Return who is in the fleet. Raises CliError."""
    try:
        return list_entries(fleet)
    except BusError as error:
        raise why_not(fleet, error) from None


def engine_named(fleet: RunningFleet, name: str, entries: tuple[Entry, ...] | None = None) -> Entry:
    """Return an engine's entry. Raises CliError with the nearest name."""
    entries = entries_of(fleet) if entries is None else entries
    engines = [entry for entry in entries if entry.kind == "engine"]
    for entry in engines:
        if entry.name == name:
            return entry
    other = next((entry for entry in entries if entry.name == name), None)
    known = [entry.name for entry in engines]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f'did you mean "{near[0]}"?' if near else f"its engines are {', '.join(known) or 'none'}"
    if other is not None:
        raise CliError(f'"{name}" is no engine, but a {other.kind.replace("_", " ")}: {hint}')
    raise CliError(f'fleet "{fleet.state.name}" has no engine "{name}": {hint}')


def keep(fleet: RunningFleet, engine: str, **changes: object) -> str:
    """Have the launcher of an engine start it so from now on; return a sentence where that cannot be."""
    launcher = launcher_of(fleet, engine)
    if launcher is None:
        return f"{engine} is started on another machine: restarted there, it is again as its fleet file says"
    try:
        call_launcher(launcher, KeepEngine(engine, **changes))  # type: ignore[arg-type]
    except CliError as error:
        return f"restarted, {engine} is again as its fleet file says ({error})"
    return ""
