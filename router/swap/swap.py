"""Changing the script of one router, or of several at once: prepared on all of them, then activated on all, or on none.

Once all have prepared, the change holds: a router that dies before it hears "activate" takes it over from the others
when it comes back, or from its own file if it had heard it (route_changes.py). Whoever swaps may die at any time, too:
what was prepared and never activated is forgotten.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from callboard.actors.route_protocol import (
    ActivateRoute,
    DropRoute,
    GetChange,
    GetRoutes,
    PrepareRoute,
    RouteChange,
    Routes,
)
from callboard.bus import Ask, BusError, Node, Ref
from callboard.router.errors import RouteRefused, ScriptError

from .changer import Decide

ASK_S = 3.0
PREPARE_S = 15.0
"""A router may load for a while (route_changes.py)."""
SETTLE_S = 5.0
"""How long it may take until all routers run the newest change."""
PAUSE_S = 0.1


@dataclass(frozen=True, slots=True)
class Target:
    """A router to be changed."""

    name: str
    ref: Ref


@dataclass(frozen=True, slots=True)
class Swapped:
    """A change that holds. ``late``: routers that have not said so yet; they take it over when they are back."""

    change: RouteChange
    late: tuple[str, ...]


async def look_at(node: Node, targets: Sequence[Target]) -> list[Routes]:
    """Return what the routers run, once they agree on the newest change. Raises RouteRefused.

    One that says why it cannot take that one over is not waited for: only another change leads out of there.
    """
    until = node.clock.now() + SETTLE_S
    while True:
        reports = [await _ask(target, GetRoutes(with_sources=True)) for target in targets]
        behind = _behind(reports)
        if not behind:
            return reports
        if node.clock.now() >= until:
            raise RouteRefused(reason=f"router {', '.join(behind)} has not taken over the last change yet: try again")
        await node.clock.sleep(PAUSE_S)


def _behind(reports: Sequence[Routes]) -> list[str]:
    newest = max(reports, key=lambda each: each.change.age).change
    meant = [each for each in reports if not newest.routers or each.router in newest.routers]
    return [each.router for each in meant if each.change.age != newest.age and not each.problem]


async def swap(node: Node, targets: Sequence[Target], decide: Decide) -> Swapped:
    """Change what the routers run. Raises RouteRefused, ScriptError; nothing was changed then, or the sentence says so.

    ``targets`` in the same order for everybody who swaps, such as by name: who is first at the first router wins.
    """
    reports = await look_at(node, targets)
    change = decide(reports)
    bases = {each.router: each.change.id for each in reports}
    try:
        # One after another: two who swap at once would each get one of two routers otherwise, and neither all.
        for target in targets:
            await _ask(target, PrepareRoute(change, bases[target.name]), timeout=PREPARE_S)
    except BaseException:
        await _all(targets, DropRoute(change.id))
        raise
    failed = await _all(targets, ActivateRoute(change.id))
    if failed:
        failed = await _still_without(node, [target for target in targets if target.name in failed], change, failed)
    if len(failed) == len(targets):
        name, error = next(iter(failed.items()))
        is_refused = all(isinstance(each, RouteRefused) for each in failed.values())
        then = "nothing was changed" if is_refused else 'whether it was, "callboard route show" tells'
        raise RouteRefused(reason=f"router {name} did not take it: {error}; {then}")
    return Swapped(change, tuple(failed))


async def _still_without(
    node: Node, targets: Sequence[Target], change: RouteChange, errors: dict[str, BusError]
) -> dict[str, BusError]:
    """Wait a while for routers of which it is not known whether they took a change; return who has not."""
    until = node.clock.now() + SETTLE_S
    left = list(targets)
    while left and node.clock.now() < until:
        for target in list(left):
            try:
                if (await target.ref.ask(GetChange(), timeout=ASK_S)).change.age >= change.age:
                    left.remove(target)
            except BusError:
                pass  # It may come back.
        await node.clock.sleep(PAUSE_S)
    return {target.name: errors[target.name] for target in left}


async def _ask(target: Target, message: Ask[Any], timeout: float = ASK_S) -> Any:
    try:
        return await target.ref.ask(message, timeout=timeout)
    except ScriptError:
        raise
    except BusError as error:
        raise RouteRefused(reason=f"router {target.name}: {error}; nothing was changed") from None


async def _all(targets: Sequence[Target], message: Ask[Any]) -> dict[str, BusError]:
    """Ask all at once; return the errors by router."""
    errors: dict[str, BusError] = {}

    async def ask(target: Target) -> None:
        try:
            await target.ref.ask(message, timeout=ASK_S)
        except BusError as error:
            errors[target.name] = error

    async with asyncio.TaskGroup() as group:
        for target in targets:
            group.create_task(ask(target))
    return errors
