"""``callboard ps``: who is in a running fleet, in what state, and how busy."""

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

import msgspec

from callboard.actors.protocol import Entry
from callboard.actors.supervisor import NodeState
from callboard.bus import BusError

from .bus_client import list_entries, why_not
from .errors import CliError
from .running import RunningFleet, once_each, open_fleet, running_fleets
from .units import format_span

if TYPE_CHECKING:
    from rich.table import Table

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
    node: str = ""
    device: str = ""
    manager: str = ""
    """The KV manager of an engine."""
    uptime_s: float | None = None
    used_blocks: int | None = None
    cached_blocks: int | None = None
    quarantined_blocks: int | None = None
    lanes: str = ""
    """A KV manager's ways to others, as in ``kv-cpu1: shm``; there is one once something has been sent."""
    script: str = ""
    version: str = ""
    prefill_tps: float | None = None
    decode_tps: float | None = None
    counters: dict[str, Any] | None = None
    """What it has done since it started, by name; an engine's or a KV manager's."""
    host: str = ""
    """The joined host that it runs on; empty where the fleet was started."""

    @property
    def role(self) -> str:
        """What it is, for people; an engine without roles of its own takes both."""
        roles = (
            "" if set(self.roles) <= {"prefill", "decode"} and len(self.roles) != 1 else f" ({', '.join(self.roles)})"
        )
        return self.kind.replace("_", " ") + roles

    @property
    def more(self) -> str:
        """What there is to say of its kind alone."""
        if self.kind == "router":
            return f"{self.script} {self.version}"
        if self.kind == "engine":
            return self.manager
        return self.lanes


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
    host: str = ""
    """The joined host whose launcher was asked; empty: the fleet's own, or none."""


def run(arguments: argparse.Namespace) -> int:
    """Print one fleet, or all that run."""
    keys = arguments.keys
    is_one = arguments.fleet is not None
    fleets = [open_fleet(arguments.fleet, keys=keys)] if is_one else once_each(running_fleets(keys=keys))
    found = [look_at(fleet) for fleet in fleets]
    exit_code = 1 if any(fleet.lacks_key for fleet in found) else 0
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(found)).decode())
        return exit_code
    if not found:
        print('No fleet is running: start one with "callboard up".')
    for fleet in found:
        _print(fleet, is_wide=arguments.wide)
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
        if fleet.is_remote:
            raise why_not(fleet, error) from None
        problem = f"the directory does not answer ({error}); this is what the launcher knows"
    except CliError as error:
        if fleet.is_remote:
            raise
        problem, lacks_key = f"{error}; this is what the launcher knows", True
    nodes, now = {node.name: node for node in state.nodes}, time.time()
    rows = [_row(entry, nodes.get(entry.address.node), now) for entry in entries]
    present = {entry.address.node for entry in entries}
    rows += [_absent(node, state.host) for node in state.nodes if node.name not in present]
    return FleetRows(
        *(state.name, state.state, state.url, state.models, state.launcher_pid),
        *(tuple(rows), problem, lacks_key, state.host),
    )


def _row(entry: Entry, node: NodeState | None, now: float) -> Row:
    has_queue, has_pool = entry.kind == "engine", entry.load.num_blocks > 0
    is_ready = node is None or node.state == "ready"
    load, detail = entry.load, entry.detail
    return Row(
        entry.name,
        entry.kind,
        entry.roles,
        entry.model,
        entry.state if is_ready or node is None else node.state,
        entry.pid or (node.pid if node else 0),
        node.num_restarts if node else 0,
        load.num_running if has_queue else None,
        load.num_waiting if has_queue else None,
        load.free_blocks if has_pool else None,
        load.num_blocks if has_pool else None,
        f"{entry.address.endpoint}#{entry.address.actor}",
        node.detail if node and not is_ready else "",
        entry.num_strangers,
        node=entry.address.node,
        device=entry.device,
        manager=entry.manager.actor if entry.manager else "",
        uptime_s=max(0.0, round(now - entry.started, 3)) if entry.started else None,
        used_blocks=load.num_blocks - load.free_blocks if has_pool else None,
        cached_blocks=load.cached_blocks if has_pool else None,
        quarantined_blocks=load.quarantined_blocks if entry.kind == "kv_manager" else None,
        lanes=detail.get("lanes", ""),
        script=detail.get("script", ""),
        version=detail.get("version", ""),
        prefill_tps=load.prefill_tps if has_queue else None,
        decode_tps=load.decode_tps if has_queue else None,
        counters=msgspec.structs.asdict(entry.counters) if entry.kind in ("engine", "kv_manager") else None,
        host=entry.host,
    )


def _absent(node: NodeState, host: str) -> Row:
    kind, nothing = node.kind, None
    return Row(
        *(node.name, kind, (), "", node.state, node.pid, node.num_restarts),
        *(nothing, nothing, nothing, nothing, "", node.detail),
        node=node.name,
        host=host,
    )


def _print(fleet: FleetRows, *, is_wide: bool) -> None:
    from rich.console import Console

    console = Console(highlight=False, width=WIDTH)
    where = f" at {fleet.url}/v1" if fleet.url else ""
    whose = f", host {fleet.host}" if fleet.host else ""
    console.print(f"Fleet {fleet.name}{whose}: {fleet.state}{where}", markup=False)
    console.print(_table(fleet, is_wide=is_wide))
    if any(row.num_blocks for row in fleet.actors):
        what = "LOAD: sequences running/waiting. USED, CACHED: of all KV BLOCKS; cached ones can be had."
        console.print(what, style="dim")
    for row in fleet.actors:
        if row.quarantined_blocks:
            console.print(f"{row.name}: {row.quarantined_blocks} of the used blocks are quarantined", markup=False)
        if row.detail:
            console.print(f"{row.name}: {row.detail}", markup=False)
    for node in dict.fromkeys(row.node for row in fleet.actors if row.num_strangers):
        rows = [row for row in fleet.actors if row.node == node]
        names, num = ", ".join(row.name for row in rows), max(row.num_strangers or 0 for row in rows)
        were = "connection without the fleet's keys was" if num == 1 else "connections without the fleet's keys were"
        console.print(f"{names}: {num} {were} turned away", markup=False)


def _table(fleet: FleetRows, *, is_wide: bool) -> "Table":
    """Return the table of the actors; 120 columns hold it unless names are long. ``is_wide`` adds to it."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    has_hosts = len({row.host for row in fleet.actors}) > 1
    titles = ["NAME", *(["HOST"] if has_hosts else []), "ROLE", "MODEL", "STATE"]
    titles += ["UP", "LOAD", "USED", "CACHED", "BLOCKS", "WITH"]
    for title in [*titles, *(["PID", "DEVICE", "ADDRESS"] if is_wide else [])]:
        is_number = title in ("UP", "LOAD", "USED", "CACHED", "BLOCKS", "PID")
        table.add_column(title, justify="right" if is_number else "left", no_wrap=True)
    for row in fleet.actors:
        restarts = f" ({row.num_restarts} restart{'s' * (row.num_restarts > 1)})" if row.num_restarts else ""
        color = "green" if row.state == "ready" else "red" if row.state == "failed" else "yellow"
        has_pool = row.kind == "kv_manager" and row.num_blocks is not None
        numbers = (row.used_blocks, row.cached_blocks, row.num_blocks) if has_pool else ("", "", "")
        table.add_row(
            escape(row.name),
            *([escape(row.host or "-")] if has_hosts else []),
            row.role,
            escape(row.model),
            f"[{color}]{row.state}{restarts}[/]",
            "" if row.uptime_s is None else format_span(row.uptime_s),
            "" if row.num_running is None else f"{row.num_running}/{row.num_waiting}",
            *map(str, numbers),
            escape(row.more),
            *([str(row.pid or ""), row.device, escape(row.address)] if is_wide else []),
        )
    return table
