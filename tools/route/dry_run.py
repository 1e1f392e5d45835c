"""A script tried on simulated engines: the real router, KV managers and schedulers, on a virtual clock.

Only the model is none. What is wrong with the script is found by what becomes of its requests: tokens that are lost or
wrong, reservations that it leaves behind, requests that never end or fail, engines that die under them.
"""

import asyncio
import logging
import re
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from callboard.actors.engine.simulated import simulated_tokens
from callboard.actors.protocol import Generate, GetKvStats, SamplingParams
from callboard.actors.route_protocol import ScriptText
from callboard.bus import BusError
from callboard.bus.testing import VirtualLoop
from callboard.kv.tokens import pack_tokens
from callboard.router.errors import NoEngine, NoRouter

from .dry_fleet import DEADLINE_S, MODEL, SIMULATION, DryFleet
from .hanging import Hung, while_not_hung

T = TypeVar("T")

MOST_STEPS = 200_000
"""Of the loop, of which a dry run takes some 7,000: one that goes round in circles takes no time on a virtual clock."""
MOST_ROLES = 4
MOST_ROUTERS = 2
MOST_NAMED = 3
DEATH_AFTER = 10
"""Tokens of the request whose engine dies."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of the dry run."""

    name: str
    prompt: tuple[int, ...]
    num_tokens: int
    kills: bool = False
    """Its engine dies while it generates."""


@dataclass(slots=True)
class Row:
    """What became of one request. Times are virtual milliseconds."""

    name: str
    num_prompt: int
    num_output: int
    ttft_ms: float | None = None
    total_ms: float | None = None
    verbs: tuple[str, ...] = ()
    notes: dict[str, str] | None = None
    is_failed: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """A dry run. The script passed if ``problems`` is empty: each is a few lines, with the script's own."""

    engines: tuple[str, ...]
    rows: tuple[Row, ...]
    problems: tuple[str, ...]


def dry_run(text: ScriptText) -> Outcome:
    """Try a script that loads. Raises ScriptError."""
    roles, routers = ["prefill", "decode"], list[str]()
    while True:
        try:
            with _without_logs(), while_not_hung(text.path):
                outcome, lacking = _run_virtual(lambda: _try(text, roles, routers))
        except Hung as hung:
            why = "for seconds: await what takes long" if hung.has_blocked else "and never awaits anything"
            return Outcome((), (), (f"{text.path}:{hung.line}: it keeps the router from everything else here, {why}",))
        except RuntimeError as error:  # Of the virtual loop: nothing can happen any more, or it goes round.
            return Outcome((), (), (f"{text.path}: {error}",))
        if isinstance(lacking, NoEngine) and lacking.role and lacking.role not in roles and len(roles) < MOST_ROLES:
            roles.append(lacking.role)  # A label of the fleet that it is written for.
        elif isinstance(lacking, NoRouter) and lacking.name not in routers and len(routers) < MOST_ROUTERS:
            routers.append(lacking.name)
        else:
            return outcome


def requests() -> list[list[Asked]]:
    """Return the requests, in groups: those of one group are asked at once."""
    long = tuple(range(1000, 1700))
    burst = [Asked(f"burst {n}", tuple(range(3000 * n, 3000 * n + 60 * n)), 12) for n in range(1, 7)]
    return [
        [Asked("short", tuple(range(24)), 8)],
        [Asked("long", long, 16)],
        [Asked("long again", long, 16)],
        [Asked("shares 640", (*long[:640], *range(40)), 16)],
        burst,
        [Asked("engine dies", tuple(range(5000, 5300)), 40, kills=True)],
        [Asked("after that", tuple(range(24)), 8)],
    ]


async def _try(text: ScriptText, roles: list[str], routers: list[str]) -> tuple[Outcome, NoEngine | NoRouter | None]:
    """Return what became of it, and what the fleet lacks that the script asks for."""
    async with DryFleet(text, roles, routers) as fleet:
        rows: list[Row] = []
        failed: dict[str, list[str]] = {}
        lacking: NoEngine | NoRouter | None = None
        for group in requests():
            made = await asyncio.gather(*(_ask(fleet, asked, failed) for asked in group))
            rows += [row for row, _ in made]
            lacking = lacking or next((error for _, error in made if error), None)
        await asyncio.sleep(1.0)  # Until what is cancelled is given back.
        problems = [f"{what}\n{_named(names)}" for what, names in _merged(failed).items()]
        problems += await _left_behind(fleet)
        names = tuple(fleet.engines)
        return Outcome(names, tuple(rows), tuple(dict.fromkeys(problems))), lacking


def _merged(failed: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return what failed at one place once, where its words differ in numbers alone."""
    words: dict[tuple[str, str], str] = {}
    merged: dict[str, list[str]] = {}
    for what, names in failed.items():
        place, _, last = what.rpartition("\n")
        same = words.setdefault((place, re.sub(r"\d+", "0", last) if place else last), what)
        merged.setdefault(same, []).extend(names)
    return merged


def _named(names: list[str]) -> str:
    shown, more = names[:MOST_NAMED], len(names) - MOST_NAMED
    return f"requests: {', '.join(shown)}{f', and {more} more' if more > 0 else ''}"


async def _ask(fleet: DryFleet, asked: Asked, problems: dict[str, list[str]]) -> tuple[Row, NoEngine | NoRouter | None]:
    clock, sampling = fleet.client.clock, SamplingParams(max_tokens=asked.num_tokens, ignore_eos=True)
    request_id = asked.name.replace(" ", "-")
    row = Row(asked.name, len(asked.prompt), asked.num_tokens)
    message = Generate(request_id, MODEL, pack_tokens(asked.prompt), sampling)
    begin = clock.now()
    lacking: NoEngine | NoRouter | None = None
    got: list[int] = []
    try:
        async with fleet.router.stream(message, timeout=2 * DEADLINE_S) as tokens:
            async for token in tokens:
                if not got:
                    row.ttft_ms = (clock.now() - begin) * 1000
                got.append(token.id)
                if asked.kills and len(got) == DEATH_AFTER:
                    await fleet.kill_the_one_that_generates(request_id)
        row.total_ms = (clock.now() - begin) * 1000
        due = simulated_tokens(asked.prompt, asked.num_tokens, SIMULATION, sampling)
        if got != due:
            problems.setdefault(f"{fleet.path}: tokens are wrong", []).append(asked.name)
    except BusError as error:
        row.is_failed = True
        lacking = error if isinstance(error, NoEngine | NoRouter) else None
        what = f"{asked.name} (after {len(got)} of {asked.num_tokens} tokens)"
        words = (fleet.trace_of(request_id) or str(error)).replace(f"request {request_id}", "the request")
        problems.setdefault(words, []).append(what)
    row.verbs = fleet.verbs_of(request_id)
    row.notes = fleet.notes_of(request_id)
    return row, lacking


async def _left_behind(fleet: DryFleet) -> list[str]:
    problems = list(fleet.leaks())
    for name in fleet.managers:
        stats = await fleet.client.ref(fleet.managers[name]).ask(GetKvStats(recall=True))
        if stats.reserved:
            problems.append(f"{fleet.path}: {stats.reserved} blocks stay reserved in {name} when all requests are over")
        problems += [f"{name}: {problem}" for problem in stats.problems]
    for report in fleet.background():
        if report.num_failures:
            problems.append(f"{report.last_error}\n(in the background, {report.num_failures} times)")
    return problems


def _run_virtual(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    loop = VirtualLoop(most_steps=MOST_STEPS)
    try:
        return loop.run_until_complete(main())
    finally:
        loop.most_steps = float("inf")
        loop.wind_up()


@contextmanager
def _without_logs() -> Iterator[None]:
    """What the router logs of a failing script is in the outcome."""
    level = logging.root.manager.disable
    logging.disable()
    try:
        yield
    finally:
        logging.disable(level)
