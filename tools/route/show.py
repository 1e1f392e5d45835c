"""``callboard route show`` and ``history``: what the routers run, have run, and how it does."""

import argparse
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from callboard.actors.route_protocol import GetRoutes, RouteChange, RouteRecord, Routes, ScriptText, ShadowReport
from callboard.bus import BusError, Node
from callboard.router.errors import RouteRefused
from callboard.router.swap.swap import Target
from callboard.tools.units import format_span

from .routers import visit

WORDS = {"failed": "went back from one that failed"}
"""How changes are told, where their names do not say it."""


def run_show(arguments: argparse.Namespace) -> int:
    """Print what every router runs."""
    reports = _reports(arguments, with_sources=arguments.source or arguments.json)
    if arguments.json:
        _print_json(reports)
        return 0
    if arguments.source:
        print(reports[0].change.active.source, end="")
        return 0
    for number, report in enumerate(reports):
        if number:
            print()
        _print_report(report)
    return 0


def run_history(arguments: argparse.Namespace) -> int:
    """Print the changes, the last one first."""
    reports = _reports(arguments, with_sources=False)
    if arguments.json:
        _print_json({each.router: each.history for each in reports})
        return 0
    shown: list[tuple[int, str]] | None = None
    for report in reports:
        changes = [(record.epoch, record.id) for record in report.history]
        if changes == shown:
            print(f"Router {report.router}: the same")
            continue
        shown = changes
        print(f"Router {report.router}")
        names = {each.script.number: each for each in report.versions}
        for record in reversed(report.history):
            version = names.get(record.active)
            name = "?" if version is None else f"{version.script.name} {version.version}"
            print(f"  {_when(record.at)}  version {record.active:<3} {name}  {_what(record)}{_by(record.by)}")
            for line in record.why.splitlines():
                print(f"      {line}")
    return 0


def _reports(arguments: argparse.Namespace, *, with_sources: bool) -> list[Routes]:
    async def do(node: Node, targets: list[Target]) -> list[Routes]:
        found = []
        for target in targets:
            try:
                found.append(await target.ref.ask(GetRoutes(with_sources), timeout=3.0))
            except BusError as error:
                raise RouteRefused(reason=f"router {target.name} does not answer: {error}") from None
        return found

    return visit(arguments, do)


def _print_json(value: object) -> None:
    print(msgspec.json.format(msgspec.json.encode(_named(value))).decode())


def _named(value: Any) -> Any:
    """Return a value with its fields by name: on the bus they travel by position."""
    if isinstance(value, msgspec.Struct):
        return {name: _named(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, list | tuple):
        return [_named(each) for each in value]
    return {name: _named(each) for name, each in value.items()} if isinstance(value, dict) else value


def _print_report(report: Routes) -> None:
    change = report.change
    what = WORDS.get(change.what, change.what)
    print(f"Router {report.router}: {change.active.name} (version {change.active.number}), {what}{_by(change.by)}")
    print(f"  since    {_when(change.at)} ({format_span(max(0.0, time.time() - change.at))})")
    _print_script(change.active)
    _print_trial(change, report.shadow)
    if change.is_new and change.before is not None:
        most = change.max_failures
        when = f"{most} failures in its last 20 requests" if most else "nothing: --max-failures 0"
        print(f"  before   {change.before.name} (version {change.before.number}); it comes back after {when}")
    if report.prepared:
        print(f"  prepared {report.prepared}")
    if report.problem:
        print(f"  problem  {report.problem}")
    print("\n  VERSION  SCRIPT            HASH          REQUESTS  FAILED  IN FLIGHT")
    for each in report.versions:
        mark = " rolled back" if each.is_rolled_back else ""
        print(
            f"  {each.script.number:<7}  {each.script.name:<16}  {each.version}  "
            f"{each.num_requests:>8}  {each.num_failures:>6}  {each.num_in_flight:>9}{mark}"
        )
        for work in each.background:
            every = "once" if work.every_s is None else f"every {work.every_s:g} s"
            print(f"           background {work.name}, {every}: {work.num_runs} runs, {work.num_failures} failed")
            _print_trace(work.last_error)
        _print_trace(each.last_error)


def _print_script(script: ScriptText) -> None:
    print(f"  from     {script.path}")
    if script.options:
        print(f"  options  {', '.join(f'{name}={value}' for name, value in script.options.items())}")


def _print_trial(change: RouteChange, shadow: ShadowReport | None) -> None:
    if change.trial is None:
        return
    name = f"{change.trial.name} (version {change.trial.number})"
    if change.share:
        print(f"  canary   {name} for {change.share:g} per cent of the requests, from {change.trial.path}")
        return
    print(f"  shadow   {name}, from {change.trial.path}")
    if shadow is None:
        return
    share = f": {100 * shadow.num_agreed / shadow.num_compared:.1f} per cent" if shadow.num_compared else ""
    print(f"           decided alike for {shadow.num_agreed} of {shadow.num_compared} requests{share}")
    print(
        f"           {shadow.num_failed} failed, {shadow.num_skipped} skipped to spare the requests, "
        f"{shadow.num_unlike} not comparable, {shadow.num_moved} left out because they moved"
    )
    _print_trace(shadow.last_error)
    for each in shadow.differing:
        print(f"           request {each.request_id}")
        _print_columns(each.active, each.shadow)


def _print_columns(active: Sequence[str], shadow: Sequence[str]) -> None:
    width = max(len(line) for line in ("active", *active))
    print(f"             {'active':{width}}   shadow")
    for number in range(max(len(active), len(shadow))):
        left = active[number] if number < len(active) else ""
        right = shadow[number] if number < len(shadow) else ""
        print(f"             {left:{width}} {'|' if left == right else '≠'} {right}".rstrip())


def _print_trace(trace: str) -> None:
    for line in trace.splitlines():
        print(f"             {line}")


def _what(record: RouteRecord) -> str:
    if record.trial is None:
        return WORDS.get(record.what, record.what)
    share = f" for {record.share:g} per cent" if record.share else ""
    return f"{record.what}{share}: version {record.trial}"


def _by(who: str) -> str:
    return f" by {who}" if who else ""


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at)) if at else "at the start"
