"""``callboard replay``: from the words of the command line to what differs."""

import argparse
import asyncio
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from callboard.router.errors import ScriptError
from callboard.router.script import Script, load_script, shipped_scripts
from callboard.tools.errors import CliError
from callboard.tools.running import RunningFleet, open_fleet, running_fleets
from callboard.tools.trace.recording import read_recording
from callboard.tools.units import format_size

from .costs import Costs, Fit
from .outcomes import Outcome
from .recorded import RecordedRequest
from .report import Pair, Progress, Report, compare, show
from .shape import RouterShape, Shape
from .simulated import simulate
from .tape import Tape, read_tape

MOST_FITS = 8


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay brought, and how to speak of it."""

    outcomes: dict[str, Outcome]
    by: str
    script: str
    seed: int | None
    notes: list[str]
    costs: list[str]


def run(arguments: argparse.Namespace) -> int:
    """Replay a recording and print what differs. Raises CliError."""
    if arguments.file is None:
        # In "--simulate today.rec" the option has taken the recording for a fleet file.
        arguments.file, arguments.simulate = arguments.simulate, ""
    if not arguments.file:
        raise CliError("name the recording to replay, as in: callboard replay today.rec")
    if arguments.simulate is not None and arguments.fleet is not None:
        raise CliError("--fleet replays against a running fleet, and --simulate without one: give one of them")
    if not 0.001 <= arguments.speed <= 1000:
        raise CliError(f"--speed {arguments.speed:g} is no speed: give a number from 0.001 to 1000")
    if arguments.limit is not None and arguments.limit < 1:
        raise CliError(f"--limit {arguments.limit} would replay nothing: give at least 1")
    options = _options(arguments.set)
    if arguments.router is not None:
        _load(arguments.router, options)  # Before anything is read: a script that is not there is said at once.
    elif options and _is_live(arguments):
        raise CliError("--set sets options of a script that runs here: name it with --router")
    read_recording(arguments.file, is_partial=arguments.partial)  # One that is not there is said first.
    fleet = None
    if _is_live(arguments):
        fleet = open_fleet(arguments.fleet, keys=arguments.keys)
    with Progress() as progress, _without_logs():
        tape = read_tape(arguments.file, is_partial=arguments.partial, limit=arguments.limit, show=progress)
        if fleet is None:
            replayed = _simulated(arguments, tape, options, progress)
        else:
            replayed = _live(arguments, tape, fleet, options, progress)
    pairs = _pairs(tape, replayed.outcomes)
    if not pairs:
        raise CliError("nothing was recorded of the replay: no request can be compared")
    summary, rows = compare(pairs)
    notes = (*tape.notes, *replayed.notes)
    report = Report(
        *(tape.describe(), tape.fleet, replayed.by, replayed.script, arguments.speed, replayed.seed),
        *(notes, tuple(replayed.costs), summary, rows),
    )
    show(report, as_json=arguments.json)
    return 0


@contextmanager
def _without_logs() -> Iterator[None]:
    """Routers log what goes wrong with a request; here that is a result, and told as one."""
    log = logging.getLogger("callboard")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _is_live(arguments: argparse.Namespace) -> bool:
    if arguments.simulate is not None:
        return False
    return arguments.fleet is not None or bool(running_fleets(keys=arguments.keys))


def _options(given: Sequence[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise CliError(f'--set "{text}" sets nothing: write --set NAME=VALUE, as in --set ratio=0.3')
        options[name] = value
    return options


def _load(where: str, options: dict[str, Any]) -> Script:
    try:
        return load_script(where, options)
    except ScriptError as error:
        raise CliError(str(error)) from None


def _pairs(tape: Tape, replayed: dict[str, Outcome]) -> list[Pair]:
    first = tape.requests[0].time
    return [
        Pair(tape.outcomes[request.id], replayed[request.id], request.time - first)
        for request in tape.requests
        if request.id in tape.outcomes and request.id in replayed
    ]


# ---- live ----------------------------------------------------------------------------------------------------------


def _live(
    arguments: argparse.Namespace, tape: Tape, fleet: RunningFleet, options: dict[str, Any], progress: Progress
) -> Replayed:
    from .live import Router, replay_live

    router = None
    if arguments.router is not None:
        router = Router(arguments.router, options)
    live = asyncio.run(replay_live(fleet, tape.requests, router=router, speed=arguments.speed, show=progress))
    notes = list(live.notes)
    if live.asked.num_late:
        late = f"up to {live.asked.latest_s:.2f} s"
        notes.append(f"{live.asked.num_late} requests were asked late, {late}: this machine did not keep up")
    return Replayed(live.outcomes, f'against the running fleet "{fleet.state.name}"', live.script, None, notes, [])


# ---- simulated -----------------------------------------------------------------------------------------------------


def _simulated(arguments: argparse.Namespace, tape: Tape, options: dict[str, Any], progress: Progress) -> Replayed:
    if arguments.simulate:
        from .file_shape import shape_of_file

        name, shape = shape_of_file(arguments.simulate)
        where = f'the fleet "{name}" of {Path(arguments.simulate).name}'
    else:
        shape = tape.shape.shape()
        where = f'the fleet "{tape.fleet}" as it was recorded'
    requests, notes = _served(shape, tape.requests)
    notes = [*shape.guesses, *notes]
    recorded, shape, script = shape, *_with_scripts(shape, arguments.router, options, notes)
    outcomes, _ = simulate(requests, shape, tape.costs, seed=arguments.seed, speed=arguments.speed, show=progress)
    if not arguments.simulate and arguments.speed == 1.0 and (arguments.router is not None or options):
        notes.append(_own_error(tape, recorded, arguments.seed, progress))
    by = f"in a simulation of {where}: {_count(shape)}"
    return Replayed(outcomes, by, script, arguments.seed, notes, describe(tape.costs, shape))


def _own_error(tape: Tape, shape: Shape, seed: int, progress: Progress) -> str:
    """Return how far the simulation is off where the truth is known: with the script that was recorded."""
    try:
        shape, _ = _with_scripts(shape, None, {}, [])
    except CliError:
        return "the recorded script is not here: how far the simulation is off by itself is not known"
    outcomes, _ = simulate(tape.requests, shape, tape.costs, seed=seed, speed=1.0, show=progress)
    summary, _ = compare(_pairs(tape, outcomes))
    found = []
    for each in summary.quantities:
        if each.unit == "s" and each.recorded is not None and each.replayed is not None:
            off = (each.replayed.mean - each.recorded.mean) / max(each.recorded.mean, 1e-9)
            found.append(f"{each.name} {off:+.0%}")
    same = summary.num_requests - summary.num_engines_differ - summary.num_ranges_differ
    return (
        f"the simulation's own error: with the recorded script it gives a mean {', '.join(found)}, and "
        f"{same} of {summary.num_requests} decisions as they were recorded"
    )


def _served(shape: Shape, requests: Sequence[RecordedRequest]) -> tuple[list[RecordedRequest], list[str]]:
    models = {engine.model: None for engine in shape.engines}
    wanted = [request for request in requests if request.model in models]
    others = ", ".join(dict.fromkeys(f'"{request.model}"' for request in requests if request.model not in models))
    if not wanted:
        raise CliError(f"the simulated fleet serves {', '.join(models)}, and the recording asks for {others}")
    left = len(requests) - len(wanted)
    return wanted, [f"{left} requests for {others} are left out: the fleet serves no such model"] if left else []


def _count(shape: Shape) -> str:
    num = len(shape.engines)
    return f"{num} engine{'s' * (num != 1)} ({', '.join(engine.name for engine in shape.engines[:6])})" + (
        ", ..." if num > 6 else ""
    )


def _with_scripts(shape: Shape, router: str | None, options: dict[str, Any], notes: list[str]) -> tuple[Shape, str]:
    """Return the shape with scripts that are here, checked, and what they are called."""
    routers, names = [], []
    for each in shape.routers:
        made = replace(each, script=router, version="", options=options) if router is not None else _recorded(each)
        if router is None:
            made = replace(made, options={**made.options, **options})
        script = _load(made.script, made.options)
        if each.version and router is None and script.version != each.version:
            notes.append(
                f"{script.path} has changed since it was recorded: it was version {each.version}, now {script.version}"
            )
        shown = ", ".join(f"{name}={value}" for name, value in script.options.items())
        names.append(f"{script.name} {script.version}" + (f" ({shown})" if shown else ""))
        routers.append(made)
    return replace(shape, routers=tuple(routers)), ", ".join(dict.fromkeys(names))


def _recorded(router: RouterShape) -> RouterShape:
    """Return a router whose script is here: where it was, or a shipped one of its name."""
    path = Path(router.script)
    if path.is_file() or router.script in shipped_scripts():
        return router
    if path.stem in shipped_scripts():
        return replace(router, script=path.stem)
    raise CliError(f"the script of the recording, {router.script}, is not here: give one with --router")


# ---- what was fitted -----------------------------------------------------------------------------------------------


def describe(costs: Costs, shape: Shape) -> list[str]:
    """Return what a simulation charges, and how well that is known, in lines."""
    lines = []
    known = [costs.engines[engine.name] for engine in shape.engines if engine.name in costs.engines]
    lines += [_describe_fit(fit) for fit in known[:MOST_FITS]]
    if len(known) > MOST_FITS:
        lines.append(f"... and so for {len(known) - MOST_FITS} more engines")
    if len(known) < len(shape.engines):
        lines.append(_describe_fit(costs.others))
    managers = {manager.name for manager in shape.managers}
    senders = [pages for names, pages in costs.pages.items() if managers.issuperset(names)]
    measured = senders or [costs.other_pages] * (costs.other_pages.num_sends > 0)
    if measured:
        low, high = (_speed(f(pages.bytes_per_s for pages in measured)) for f in (min, max))
        speed = low if low == high else f"{low} to {high.removeprefix('at ')}"
        moves = f"{speed}, from {sum(pages.num_sends for pages in measured)} sends"
    else:
        moves = f"at {format_size(round(costs.other_pages.bytes_per_s))}/s, guessed"
    latency = f"{costs.latency_s * 1000:.2f} ms" + ("" if costs.num_latencies else ", guessed")
    lines.append(f"KV moves {moves}; a message takes {latency}")
    return lines


def _speed(bytes_per_s: float) -> str:
    return "at once" if math.isinf(bytes_per_s) else f"at {format_size(round(bytes_per_s))}/s"


def _describe_fit(fit: Fit) -> str:
    step, token, decode = (f"{seconds * 1000:.3g} ms" for seconds in fit.costs)
    what = f"a step of {fit.engine}" if fit.engine else "a step of other engines"
    cost = f"{what} takes {step}, {token} more for each prefill token, {decode} for each sequence that decodes"
    num = fit.num_prefills + fit.num_decodes
    if not num:
        return f"{cost}: guessed, nothing was recorded of any"
    gap = f", and {fit.gap_s * 1000:.2g} ms lie between two" if fit.gap_s > 5e-6 else ""
    how = f"fitted to {num} phases, off by {fit.error_p50:.1%} (median), {fit.error_p90:.1%} (90th percentile)"
    return f"{cost}{gap}: {how}"
