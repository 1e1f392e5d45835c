"""``callboard ps``: who is in a running fleet, in what state, and how busy."""

import argparse
import sys

import msgspec

from callboard.actors.protocol import Entry
from callboard.actors.supervisor import NodeState
from callboard.bus import BusError

from .bus_client import list_entries
from .errors import CliError
from .running import RunningFleet, find_fleet, running_fleets

WIDTH = 500
"""Wider than any table: a terminal wraps a long line, and no cell is cut off."""


class Row(msgspec.Struct, frozen=True):
    """One actor (or a process whose actor is not there), as ``--json`` prints it."""

    name: str
    kind: str
    roles: tuple[str, ...]
    model: str
    state: str
    pid: int
    num_restarts: int
    num_running: int | None
    num_waiting: int | None
    free_blocks: int | None
    num_blocks: int | None
    address: str
    detail: str
    num_strangers: int | None = None
    """Connections that its node turned away, because they did not show the fleet's keys."""


class FleetRows(msgspec.Struct, frozen=True):
    """One fleet, as ``--json`` prints it."""

    name: str
    state: str
    url: str | None
    models: tuple[str, ...]
    launcher_pid: int
    actors: tuple[Row, ...]
    problem: str | None = None
    lacks_key: bool = False
    """The directory was not asked, or did not answer, for want of the fleet's keys."""


def run(arguments: argparse.Namespace) -> int:
    """Print one fleet, or all that run."""
    keys = arguments.keys
    fleets = running_fleets(keys=keys) if arguments.fleet is None else [find_fleet(arguments.fleet, keys=keys)]
    found = [look_at(fleet) for fleet in fleets]
    exit_code = 1 if any(fleet.lacks_key for fleet in found) else 0
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(found)).decode())
        return exit_code
    if not found:
        print('No fleet is running: start one with "callboard up".')
    for fleet in found:
        _print(fleet)
        if fleet.problem is not None:
            print(fleet.problem, file=sys.stderr)
    return exit_code


def look_at(fleet: RunningFleet) -> FleetRows:
    """Join what the directory and the launcher know of a fleet."""
    state, problem, lacks_key = fleet.state, None, False
    entries: tuple[Entry, ...] = ()
    try:
        entries = list_entries(fleet)
    except BusError as error:
        problem = f"the directory does not answer ({error}); this is what the launcher knows"
    except CliError as error:
        problem, lacks_key = f"{error}; this is what the launcher knows", True
    nodes = {node.name: node for node in state.nodes}
    rows = [_row(entry, nodes.get(entry.address.node)) for entry in entries]
    present = {entry.address.node for entry in entries}
    rows += [_absent(node) for node in state.nodes if node.name not in present]
    return FleetRows(
        state.name, state.state, state.url, state.models, state.launcher_pid, tuple(rows), problem, lacks_key
    )


def _row(entry: Entry, node: NodeState | None) -> Row:
    has_queue, has_pool = entry.kind == "engine", entry.load.num_blocks > 0
    is_ready = node is None or node.state == "ready"
    return Row(
        entry.name,
        entry.kind,
        entry.roles,
        entry.model,
        entry.state if is_ready or node is None else node.state,
        entry.pid or (node.pid if node else 0),
        node.num_restarts if node else 0,
        entry.load.num_running if has_queue else None,
        entry.load.num_waiting if has_queue else None,
        entry.load.free_blocks if has_pool else None,
        entry.load.num_blocks if has_pool else None,
        f"{entry.address.endpoint}#{entry.address.actor}",
        node.detail if node and not is_ready else "",
        entry.num_strangers,
    )


def _absent(node: NodeState) -> Row:
    kind, nothing = node.kind, None
    return Row(
        *(node.name, kind, (), "", node.state, node.pid, node.num_restarts),
        *(nothing, nothing, nothing, nothing, "", node.detail),
    )


def _print(fleet: FleetRows) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, width=WIDTH)
    where = f" at {fleet.url}/v1" if fleet.url else ""
    console.print(f"Fleet {fleet.name}: {fleet.state}{where}", markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("NAME", "KIND", "ROLES", "MODEL", "STATE", "PID", "LOAD", "BLOCKS", "ADDRESS"):
        table.add_column(title, justify="right" if title in ("PID", "LOAD", "BLOCKS") else "left", no_wrap=True)
    for row in fleet.actors:
        state = row.state + (f" ({row.num_restarts} restart{'s' * (row.num_restarts > 1)})" if row.num_restarts else "")
        color = "green" if row.state == "ready" else "red" if row.state == "failed" else "yellow"
        table.add_row(
            row.name,
            row.kind,
            "+".join(row.roles),
            escape(row.model),
            f"[{color}]{state}[/]",
            str(row.pid or ""),
            "" if row.num_running is None else f"{row.num_running}/{row.num_waiting}",
            "" if row.num_blocks is None else f"{row.free_blocks}/{row.num_blocks}",
            row.address,
        )
    console.print(table)
    console.print("LOAD is running/waiting, BLOCKS is free/total.", style="dim")
    for row in fleet.actors:
        if row.detail:
            console.print(f"{row.name}: {row.detail}", markup=False)
    for pid in dict.fromkeys(row.pid for row in fleet.actors if row.num_strangers):
        rows = [row for row in fleet.actors if row.pid == pid]
        names, num = ", ".join(row.name for row in rows), max(row.num_strangers or 0 for row in rows)
        were = "connection without the fleet's keys was" if num == 1 else "connections without the fleet's keys were"
        console.print(f"{names}: {num} {were} turned away", markup=False)
