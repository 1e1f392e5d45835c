"""The versions of a router's script: which one serves a request, how each does, and the way back from one that fails.

A request keeps the version it began with, in later attempts, too, unless that one was rolled back for failing: then
they take the active one. What is changed comes in by route_changes.py.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from callboard.actors import route_protocol
from callboard.actors.protocol import Generate
from callboard.actors.route_protocol import MOST_TEXT, RouteChange, RouteRecord, ScriptText
from callboard.bus.watchdog import Hung
from callboard.router.errors import ScriptError
from callboard.router.guest import Guest
from callboard.router.request import Request
from callboard.router.script import Script, load_in_time, read_script
from callboard.router.script_trace import in_one_line, trace_of
from callboard.router.shared import Shared
from callboard.router.spans import request_of
from callboard.router.watching import Watching

from .background_work import BackgroundWork
from .ended import forget_ended, read_ended
from .kept_routes import MOST_HISTORY, MOST_TEXTS_BYTES, KeptRoutes, read_kept, write_kept
from .shadow import Shadow
from .version import Version, record_of, report_of, without_sources

log = logging.getLogger("callboard.router")

_HASH_RANGE = 1 << 64


class Routes:
    """All versions of one router. Raises ScriptError where the first script cannot be loaded."""

    def __init__(
        self, router: str, script: str, options: Mapping[str, Any], *, kept_at: str = "", load_s: float = 0.0
    ) -> None:
        self.router = router
        self.on_change: Callable[[], None] = lambda: None
        """Called when something else runs."""
        self.is_locked: Callable[[], bool] = lambda: False
        """Whether a change is prepared: nothing may change by itself meanwhile."""
        self.watcher: Callable[[Shared, Request], Watching | None] | None = None
        """Watches every run, in place of a shadow's watch: for a dry run."""
        self._kept_at = kept_at
        self._load_s = load_s
        """How long the code of a script outside of its functions may run where all else waits for it; 0: for ever."""
        self._shared: Shared | None = None
        self._versions: dict[int, Version] = {}
        self._texts: dict[int, ScriptText] = {}
        self._history: list[RouteRecord] = []
        self._shadow: Shadow | None = None
        self._active: Version
        self._canary: Version | None = None
        self._num_hung = 0
        first = msgspec.structs.replace(read_script(script, options), number=1)
        self.change = RouteChange(1, "", "started", first, routers=(router,))
        if not self._resume():
            self._take(self.change, {1: self._load(first)})

    def start(self, shared: Shared) -> None:
        """Begin to serve: the background work of what is active starts."""
        self._shared = shared
        if not self.change.at:
            self.change = msgspec.structs.replace(self.change, at=shared.node.clock.wall())
            self._history[-1] = record_of(self.change)
        self._judge_end()
        self._tend()

    # ---- for every request ---------------------------------------------------------------------------------------

    @property
    def active(self) -> Script:
        """The script of new requests, but for those of a canary."""
        return self._active.script

    def choose(self, message: Generate) -> Script:
        """Return the script that a new request begins with."""
        # Hot: once a request.
        version = self._active
        if self._canary is not None and self._is_shared_out(message.request_id):
            version = self._canary
        version.num_requests += 1
        return version.script

    def again(self, script: Script) -> Script:
        """Return the script of a request's later attempt: the same, unless that was rolled back for failing."""
        version = self._versions.get(script.number)
        return script if version is None or not version.is_rolled_back else self._active.script

    def begins(self, script: Script, shared: Shared, request: Request) -> Watching | None:
        """Note that a script begins to run; return what watches it for the shadow, mostly None."""
        version = self._versions.get(script.number)
        if version is not None:
            version.num_in_flight += 1
        if self.watcher is not None:
            return self.watcher(shared, request)
        if self._shadow is None or version is not self._active:
            return None
        return self._shadow.watch(shared, request)

    def ended(self, script: Script, request: Request, failure: BaseException | None, *, is_finished: bool) -> None:
        """Note that it has run: to its last token, or until a ``failure`` that is its own fault, or neither."""
        version = self._versions.get(script.number)
        if version is None:
            return
        version.num_in_flight -= 1
        if failure is None:
            if is_finished:
                version.ended(request.id, is_failure=False)
            return
        version.last_error = trace_of(script.path, script.source, failure)
        self._failed(version, request.id)

    def _failed(self, version: Version, request_id: str) -> None:
        num_failures = version.ended(request_id, is_failure=True)
        if self.change.max_failures and num_failures >= self.change.max_failures and not self.is_locked():
            self._roll_back(version)

    def hung(self, hung: Hung) -> None:
        """Note that a script's code was interrupted, which kept the loop; what failed a request is counted already."""
        guest: Guest = hung.guest
        version = self._versions.get(guest.number)
        if hung.is_told or version is None:
            return
        version.last_error = trace_of(version.script.path, version.script.source, hung)
        what = "script %s (version %d) was interrupted outside of its requests: %s"
        log.error(what, guest.name, guest.number, in_one_line(version.last_error))
        self._num_hung += 1
        self._failed(version, f"hung/{self._num_hung}")

    def failure_of(self, request_id: str) -> str:
        """Return the active script's traceback if a request is among the last that failed by it, else nothing."""
        return self._active.failure_of(request_id)

    def _is_shared_out(self, request_id: str) -> bool:
        assert self.change.trial is not None
        # Of the request, not of one of its sequences; with the version, so that it is not always the same clients.
        key = f"{self.change.trial.number}/{request_of(request_id)}".encode()
        place = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
        return place * 100 < self.change.share * _HASH_RANGE

    # ---- changes -------------------------------------------------------------------------------------------------

    def load(self, change: RouteChange) -> dict[int, Script]:
        """Load what of a change is not loaded yet. Raises ScriptError and changes nothing; may run in a thread."""
        texts = [change.active, *([] if change.trial is None else [change.trial])]
        return {text.number: self._load(text) for text in texts if text.number not in self._versions}

    def _load(self, text: ScriptText) -> Script:
        return load_in_time(text, seconds=self._load_s)

    def apply(self, change: RouteChange, loaded: Mapping[int, Script]) -> None:
        """Run what a change says from now on, and remember it."""
        self._take(change, loaded)
        try:
            write_kept(self._kept_at, self.kept())
        except OSError as error:
            log.error(
                "what runs cannot be kept in %s (%s): started again, this router asks others", self._kept_at, error
            )
        what = "the script is %s (version %d)%s: %s by %s"
        trial = "" if change.trial is None else f", and {change.trial.name} (version {change.trial.number}) is tried"
        log.info(what, change.active.name, change.active.number, trial, change.what, change.by)
        self._tend()
        self.on_change()

    def _take(self, change: RouteChange, loaded: Mapping[int, Script]) -> None:
        for text in (change.active, change.trial):
            if text is not None and text.number not in self._versions:
                self._versions[text.number] = Version(text, loaded.get(text.number) or self._load(text))
        for text in (change.active, change.trial, change.before):
            if text is not None:
                self._texts[text.number] = text
        self.change = change
        self._history.append(record_of(change))
        del self._history[:-MOST_HISTORY]
        active = self._versions[change.active.number]
        if getattr(self, "_active", None) is not active:
            active.begin_anew()
        self._active = active
        trial = None if change.trial is None else self._versions[change.trial.number]
        self._canary = trial if change.share else None
        if trial is None or change.share:
            self._shadow = None
        elif self._shadow is None or self._shadow.script is not trial.script:
            self._shadow = Shadow(trial.script)
        self._forget()

    def _forget(self) -> None:
        """Drop texts that nobody can return to any more, and with them their versions."""
        present = {record.active for record in self._history} | {record.trial for record in self._history}
        present |= {record.before for record in self._history}
        own = {text.number for text in (self.change.active, self.change.trial, self.change.before) if text is not None}
        num_bytes = sum(len(text.source) for text in self._texts.values())
        for number in sorted(self._texts):
            if number not in own and (number not in present or num_bytes > MOST_TEXTS_BYTES):
                num_bytes -= len(self._texts.pop(number).source)
        for number in [number for number in self._versions if number not in self._texts]:
            del self._versions[number]

    def _roll_back(self, version: Version) -> None:
        is_canary = version is self._canary
        if not is_canary and not (version is self._active and self.change.is_new and self._earlier() is not None):
            return
        what = "script %s (version %d) failed in %d of its last %d requests and is rolled back: %s"
        log.error(what, version.script.name, version.number, *version.judged(), in_one_line(version.last_error))
        self._go_back(version)

    def _go_back(self, version: Version) -> None:
        """End a trial, or return from the active script to what was before it."""
        change, shared = self.change, self._shared
        assert shared is not None
        is_canary = version is not self._active
        version.is_rolled_back = True
        active = change.active if is_canary else self._earlier() or change.active
        back = RouteChange(
            change.epoch + 1,
            shared.node.new_id(),
            "failed",
            active,
            before=change.before if is_canary else self.before(active.number),
            max_failures=change.max_failures,
            routers=change.routers,
            by=f"router {self.router}",
            at=shared.node.clock.wall(),
            why=version.last_error[:MOST_TEXT],
            is_new=is_canary and change.is_new,
        )
        try:
            self.apply(back, self.load(back))
        except ScriptError as error:
            log.error("script %s cannot be loaded any more, its successor goes on: %s", active.name, error)

    def _earlier(self) -> ScriptText | None:
        """Return what the active script is rolled back to: the last before it that is not the same once more."""
        active, found = self.change.active, self.change.before
        seen: set[int] = set()
        while found is not None and msgspec.structs.replace(found, number=active.number) == active:
            seen.add(found.number)
            found = self.before(found.number)
            if found is not None and found.number in seen:
                return None
        return found

    def _judge_end(self) -> None:
        """Go back from a script that has ended the process before this one: it would end this one, too."""
        ended = read_ended(self.ended_at) if self._kept_at else None
        if ended is None:
            return
        forget_ended(self.ended_at)
        change = self.change
        found = ended.text_of(text for text in (change.trial, change.active) if text is not None)
        if found is None:
            what = "the process before this one was ended because it stood still: %s"
            log.error(what, ended.where())
            return
        text, line = found
        version = self._versions[text.number]
        source = text.source.splitlines()[line - 1 : line]
        version.last_error = f"{text.path}:{line}: {''.join(source).strip()}\nit did not end, and its process was ended"
        is_last = version is self._active and self._earlier() is None
        then = "it is rolled back"
        if is_last or not change.max_failures:
            then = "there is no earlier one: it goes on" if is_last else "it is not to be rolled back, and goes on"
        what = "script %s (version %d) has ended the process before this one, and %s: %s"
        log.error(what, text.name, text.number, then, in_one_line(version.last_error))
        if not is_last and change.max_failures:
            self._go_back(version)

    @property
    def ended_at(self) -> str:
        """The file that says what ended this process, for the next one; empty: there is none."""
        return f"{self._kept_at}.ended" if self._kept_at else ""

    def before(self, number: int) -> ScriptText | None:
        """Return what a version that is returned to would be rolled back to: as it was when it became active first."""
        for record in self._history:
            if record.active == number:
                return None if record.before is None else self._texts.get(record.before)
        return None

    def _tend(self) -> None:
        """Begin the background work of what is active, and end that of what is not any more. A shadow does none."""
        if self._shared is None:
            return
        working = [self._active, *([] if self._canary is None else [self._canary])]
        for version in self._versions.values():
            if version not in working and version.work is not None:
                self._shared.router.spawn(version.work.stop())
                version.work = None
        for version in working:
            if version.work is None and version.script.backgrounds:
                version.work = BackgroundWork(self._shared, version.script)

    # ---- what is told and kept -----------------------------------------------------------------------------------

    def report(self, *, with_sources: bool = False) -> route_protocol.Routes:
        """Return all of it, for people."""
        versions = [
            self._versions[number].report(with_source=with_sources)
            if number in self._versions
            else report_of(text, with_source=with_sources)
            for number, text in sorted(self._texts.items())
        ]
        return route_protocol.Routes(
            self.router,
            self.change if with_sources else without_sources(self.change),
            tuple(self._history),
            tuple(versions),
            None if self._shadow is None else self._shadow.report(),
        )

    def kept(self) -> KeptRoutes:
        """Return what must survive this process."""
        return KeptRoutes(self.change, tuple(self._history), tuple(self._texts.values()))

    def _resume(self) -> bool:
        """Go on with what was kept; return False if there is nothing, or it cannot be loaded any more."""
        kept = read_kept(self._kept_at)
        if kept is None:
            return False
        try:
            loaded = self.load(kept.change)
        except ScriptError as error:
            log.error(
                "what this router ran cannot be loaded any more: it begins with its fleet file's script: %s", error
            )
            return False
        self._texts = {text.number: text for text in kept.texts}
        self._history = list(kept.history[:-1])
        self._take(kept.change, loaded)
        return True
