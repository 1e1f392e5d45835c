"""``callboard role``: change what an engine is for, while it serves. What it has goes on."""

import argparse
import difflib
import sys
from collections.abc import Iterable

from callboard.actors.move_protocol import SetRoles
from callboard.actors.protocol import Entry
from callboard.bus import BusError

from .bus_client import ask
from .errors import CliError
from .fleet_check import NAME, NAME_RULE
from .named import engine_named, entries_of, keep
from .running import open_fleet

PARTS = ("prefill", "decode")
BOTH = "both"


def run(arguments: argparse.Namespace) -> int:
    """Give an engine its roles. Raises CliError."""
    fleet = open_fleet(arguments.fleet, keys=arguments.keys)
    roles = parse_roles(arguments.roles)
    entries = entries_of(fleet)
    engine = engine_named(fleet, arguments.engine, entries)
    try:
        ask(fleet, engine.address, SetRoles(roles))
    except BusError as error:
        raise CliError(f"{engine.name} did not take it ({error})") from None
    print(f"{engine.name} is for {_words(roles)} now; it was for {_words(engine.roles)}.", flush=True)
    for sentence in (keep(fleet, engine.name, roles=roles), *_lacking(engine, roles, entries)):
        if sentence:
            print(f"note: {sentence}", file=sys.stderr)
    return 0


def parse_roles(words: Iterable[str]) -> tuple[str, ...]:
    """Return the roles of a command line, ``both`` as its two. Raises CliError."""
    roles: list[str] = []
    for word in (part for each in words for part in each.split(",")):
        if word not in (*PARTS, BOTH):
            near = difflib.get_close_matches(word, (*PARTS, BOTH), n=1, cutoff=0.75)
            if near:
                raise CliError(f'there is no role "{word}": did you mean "{near[0]}"?')
            if NAME.fullmatch(word) is None:
                raise CliError(f'"{word}" is no role: {NAME_RULE}')
        roles += PARTS if word == BOTH else [word]
    return tuple(dict.fromkeys(roles))


def _words(roles: tuple[str, ...]) -> str:
    return " and ".join(roles) or "everything"


def _lacking(engine: Entry, roles: tuple[str, ...], entries: tuple[Entry, ...]) -> Iterable[str]:
    """Yield what nobody is for any more, among the engines of its model."""
    others = [e for e in entries if e.kind == "engine" and e.model == engine.model and e.name != engine.name]
    serving = [e.roles for e in others if e.state == "ready"] + [roles]
    for part in PARTS:
        if not any(not each or part in each for each in serving):
            yield f"no ready engine of model {engine.model} is for {part} now: scripts that ask for one find none"
