"""How busy engines are: what they report, corrected by what this router knows better.

A router counts its own requests from the moment an engine is picked, and takes from an engine's report only those of
others. Which is which the report says itself (actors/load_protocol.py): it names the requests that it counts, so that
nothing is counted twice, or goes on being counted where it has ended here. Any number of routers may do so beside each
other. Where no reports come, the directory's view stands in, which is older and names nobody.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from callboard.actors.load_protocol import LoadReport
from callboard.actors.protocol import Entry, Load
from callboard.router.spans import request_of

SUSPECT_S = 1.0
"""How long an engine that just failed is not offered, unless it registered anew before."""


@dataclass(slots=True)
class _Own:
    """One request of this router at one engine: how often it is counted, and what it will bring there.

    What it will bring is forgotten once the engine counts it itself.
    """

    num_picks: int = 0
    num_tokens: int = 0
    num_decodes: int = 0


class _Reported:
    """What an engine counts, by its own word: the requests it has, as often as it has streams for them."""

    def __init__(self) -> None:
        self.load = Load()
        self.present: dict[str, int] = {}
        self.foreign: dict[str, None] = {}
        """Of these, the ones that were not this router's when they came."""

    def num_others(self, own: Mapping[str, object]) -> int:
        # One that another router had first, and that has come to this one since, is counted as our own.
        return sum(self.present[request_id] for request_id in self.foreign if request_id not in own)

    def copy(self) -> "_Reported":
        other = _Reported()
        other.load, other.present, other.foreign = self.load, dict(self.present), dict(self.foreign)
        return other


class Loads:
    """The router's own requests by engine, what engines report, and the engines it suspects to be dead."""

    def __init__(self) -> None:
        self._own: dict[str, dict[str, _Own]] = {}
        self._reported: dict[str, _Reported] = {}
        self._told: dict[str, Load] = {}
        self._most_own: dict[str, int] = {}
        self._others: dict[str, int] = {}
        self._suspects: dict[str, tuple[Entry, float]] = {}
        self._picked: dict[str, int] = {}
        self._num_picks = 0

    # ---- what others say -----------------------------------------------------------------------------------------

    def report(self, entries: tuple[Entry, ...]) -> None:
        """Take a new view of the directory; forget the engines that are gone."""
        names = {entry.name for entry in entries}
        for known in (self._others, self._told, self._most_own, self._picked, self._suspects, self._reported):
            for name in [name for name in known if name not in names]:
                del known[name]
        for entry in entries:
            # Only a new report says something about the others; an old one may count requests of ours that ended.
            if self._told.get(entry.name) != entry.load:
                self._told[entry.name] = entry.load
                told = entry.load.num_running + entry.load.num_waiting
                own = self.num_own(entry.name)
                # It may be from any moment since the one before: an engine that is ours alone must not look busy.
                self._others[entry.name] = max(0, told - max(own, self._most_own.get(entry.name, 0)))
                self._most_own[entry.name] = own

    def take_report(self, engine: str, report: LoadReport) -> None:
        """Take what an engine says of itself, over its standing stream."""
        if report.is_whole or engine not in self._reported:
            self._reported[engine] = _Reported()
        reported, own = self._reported[engine], self._own.get(engine, {})
        reported.load = report.load
        for request_id in map(request_of, report.began):
            if request_id in own:
                own[request_id].num_tokens = own[request_id].num_decodes = 0
            elif request_id not in reported.present:
                reported.foreign[request_id] = None
            reported.present[request_id] = reported.present.get(request_id, 0) + 1
        for request_id in map(request_of, report.ended):
            left = reported.present.pop(request_id, 0) - 1
            if left > 0:
                reported.present[request_id] = left
            else:
                reported.foreign.pop(request_id, None)

    def lost(self, engine: str) -> None:
        """Note that an engine's reports have ended: until others come, the directory's view stands in."""
        self._reported.pop(engine, None)

    # ---- what is known -------------------------------------------------------------------------------------------

    def num_own(self, engine: str) -> int:
        """Return how many of this router's requests an engine has."""
        return sum(own.num_picks for own in self._own.get(engine, {}).values())

    def load(self, entry: Entry) -> Load:
        """Return an engine's load with this router's own requests counted now rather than when it was reported."""
        own = self._own.get(entry.name, {})
        reported = self._reported.get(entry.name)
        load, others = entry.load, self._others.get(entry.name, 0)
        if reported is not None:
            load, others = reported.load, reported.num_others(own)
        total = others + sum(each.num_picks for each in own.values())
        num_running = min(load.num_running, total)
        num_tokens = sum(each.num_tokens for each in own.values())
        num_decodes = sum(each.num_decodes for each in own.values())
        token_s = load.prefill_token_s or (1.0 / load.prefill_tps if load.prefill_tps else 0.0)
        return msgspec.structs.replace(
            load,
            num_running=num_running,
            num_waiting=total - num_running,
            queue_s=load.queue_s + num_tokens * token_s,
            num_generating=load.num_generating + num_decodes,
            num_uncomputed_tokens=load.num_uncomputed_tokens + num_tokens,
        )

    def last_picked(self, engine: str) -> int:
        """Return a number that is larger the later the engine was picked, 0 if never."""
        return self._picked.get(engine, 0)

    # ---- what this router does -----------------------------------------------------------------------------------

    def take(self, engine: str, request_id: str = "") -> None:
        """Count one more request of ours."""
        self._num_picks += 1
        self._picked[engine] = self._num_picks
        own = self._own.setdefault(engine, {}).setdefault(request_of(request_id), _Own())
        own.num_picks += 1
        self._most_own[engine] = max(self._most_own.get(engine, 0), self.num_own(engine))

    def give_back(self, engine: str, request_id: str = "") -> None:
        """Count one less."""
        requests, request_id = self._own[engine], request_of(request_id)
        requests[request_id].num_picks -= 1
        if not requests[request_id].num_picks:
            del requests[request_id]
        if not requests:
            del self._own[engine]

    def promise(self, engine: str, request_id: str, *, num_tokens: int, is_decode: bool) -> None:
        """Note what a request of ours that is counted there will bring: tokens to compute, and then to decode.

        The engine's reports do not have it before it has come. Instead of what was promised of it before.
        """
        own = self._own.get(engine, {}).get(request_of(request_id))
        if own is not None:
            own.num_tokens, own.num_decodes = max(0, num_tokens), int(is_decode)

    def copy(self) -> "Loads":
        """Return loads as they are now, which change for themselves from now on."""
        # Once for each request with a shadow, while it waits: deepcopy takes milliseconds where some hundreds run.
        other = Loads()
        for name, value in vars(self).items():
            setattr(other, name, copy.copy(value))
        other._own = {
            engine: {
                request_id: _Own(own.num_picks, own.num_tokens, own.num_decodes) for request_id, own in requests.items()
            }
            for engine, requests in self._own.items()
        }
        other._reported = {engine: reported.copy() for engine, reported in self._reported.items()}
        return other

    # ---- suspects ------------------------------------------------------------------------------------------------

    def suspect(self, entry: Entry, now: float) -> None:
        """Note that a call to the engine or its manager ended with its death."""
        self._suspects[entry.name] = (entry, now + SUSPECT_S)

    def suspected_until(self, entry: Entry, now: float) -> float | None:
        """Return until when the engine is not to be offered, None if it may be."""
        suspect, until = self._suspects.get(entry.name, (entry, 0.0))
        is_same = (suspect.address, suspect.manager, suspect.started) == (entry.address, entry.manager, entry.started)
        return until if is_same and now < until else None  # Another start of it is not suspected.
