"""The changes that people make of a router's script, computed from what the routers run at the moment."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from callboard.actors.route_protocol import RouteChange, Routes, ScriptText
from callboard.router.errors import RouteRefused

Decide = Callable[[Sequence[Routes]], RouteChange]
"""Makes a change out of what the routers run. Raises RouteRefused."""
SHORTEST_HASH = 4
"""Digits of a version's hash that name it."""


@dataclass(frozen=True, slots=True)
class Changer:
    """Who changes something, and when. ``names``: the routers it is for; empty: all."""

    new_id: Callable[[], str]
    by: str
    at: float
    names: tuple[str, ...] = ()

    def set_script(self, text: ScriptText, *, max_failures: int = 3) -> Decide:
        """Return what makes a script the active one. A canary, or a shadow, ends with it."""

        def decide(reports: Sequence[Routes]) -> RouteChange:
            new, before = msgspec.structs.replace(text, number=_epoch(reports)), reports[0].change.active
            return self._change(reports, "set", new, before=before, max_failures=max_failures, is_new=True)

        return decide

    def try_script(self, text: ScriptText, *, share: float | None, max_failures: int = 3) -> Decide:
        """Return what tries a script: as a canary for a ``share`` of the requests in per cent, else as a shadow."""

        def decide(reports: Sequence[Routes]) -> RouteChange:
            last = _common(reports)
            return self._change(
                reports,
                "shadow" if share is None else "canary",
                last.active,
                trial=msgspec.structs.replace(text, number=_epoch(reports)),
                share=share or 0.0,
                before=last.before,
                max_failures=max_failures,
                is_new=last.is_new,
            )

        return decide

    def promote(self, reports: Sequence[Routes]) -> RouteChange:
        """Make the canary, or the shadow, the active script."""
        last = _common(reports)
        if last.trial is None:
            raise RouteRefused(reason="nothing is tried at the moment: there is no canary and no shadow to promote")
        most = last.max_failures
        return self._change(reports, "promoted", last.trial, before=last.active, max_failures=most, is_new=True)

    def roll_back(self, version: str | None) -> Decide:
        """Return what ends a canary or a shadow, or else goes back to the script before, or to the one named.

        ``version`` is a number, or the first digits of a text's SHA-256.
        """

        def decide(reports: Sequence[Routes]) -> RouteChange:
            if version is not None:
                return self._return(reports, _find(reports, version))
            last = _common(reports)
            if last.trial is not None:
                stay, more = last.active, {"before": last.before, "is_new": last.is_new}
                return self._change(reports, "rolled back", stay, max_failures=last.max_failures, **more)
            if last.before is None:
                raise RouteRefused(reason="there is no earlier script to go back to")
            return self._return(reports, last.before)

        return decide

    def _return(self, reports: Sequence[Routes], text: ScriptText) -> RouteChange:
        changes = [each.change for each in reports]
        if all(each.active.number == text.number and each.trial is None for each in changes):
            raise RouteRefused(reason=f"version {text.number} ({text.name}) is the active one")
        before, most = _before(reports, text), changes[0].max_failures
        return self._change(reports, "rolled back", text, before=before, max_failures=most)

    def _change(self, reports: Sequence[Routes], what: Any, active: ScriptText, **more: Any) -> RouteChange:
        epoch = _epoch(reports)
        return RouteChange(epoch, self.new_id(), what, active, routers=self.names, by=self.by, at=self.at, **more)


def _epoch(reports: Sequence[Routes]) -> int:
    return 1 + max(each.change.epoch for each in reports)


def _common(reports: Sequence[Routes]) -> RouteChange:
    """Return the change that all routers run. Raises RouteRefused where they run different scripts."""
    first = reports[0].change
    if any(each.change.active != first.active or each.change.trial != first.trial for each in reports):
        those = ", ".join(f"{each.router}: {each.change.active.name}" for each in reports)
        raise RouteRefused(reason=f"the routers run different scripts ({those}): choose one with --router NAME")
    return first


def _find(reports: Sequence[Routes], version: str) -> ScriptText:
    known = {each.script.number: each for report in reports for each in report.versions}
    if version.isascii() and version.isdecimal() and int(version) in known:
        return known[int(version)].script
    is_hash = len(version) >= SHORTEST_HASH
    found = {each.version: each.script for each in known.values() if is_hash and each.version.startswith(version)}
    if len(found) == 1:
        return next(iter(found.values()))
    numbers = ", ".join(map(str, sorted(known)))
    why = "several versions begin so" if found else "there is no such version"
    raise RouteRefused(reason=f'"{version}": {why}; known are {numbers} (see "callboard route history")')


def _before(reports: Sequence[Routes], text: ScriptText) -> ScriptText | None:
    """Return what was active before a version became active first."""
    known = {each.script.number: each.script for report in reports for each in report.versions}
    for record in reports[0].history:
        if record.active == text.number:
            return None if record.before is None else known.get(record.before)
    return None
