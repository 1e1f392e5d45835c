"""Which requests are shown: words that were typed, and what the command line asked for."""

from dataclasses import dataclass

from callboard.router.spans import request_of
from callboard.tools.trace.past import bare_id
from callboard.tools.trace.story import verb_of

from .model import Tracked


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request must have to be shown; nothing is asked for by default."""

    text: str = ""
    """Words, each in its id, or the name of an actor, a verb, a phase, its model, its script, or its error."""
    request: str = ""
    """Its id, or how that begins."""
    actor: str = ""
    """Who took part."""
    verb: str = ""
    slower_s: float = 0.0
    """It took so long, or the verb that is asked for did."""
    only_errors: bool = False

    def __bool__(self) -> bool:
        return self != Wanted()

    def matches(self, tracked: Tracked, now: float) -> bool:
        """Return whether a request is to be shown."""
        if self.only_errors and not (tracked.has_errors or tracked.error):
            return False
        if not self.names(tracked.id):
            return False
        if self.actor and self.actor not in tracked.actors:
            return False
        if self.verb and self.verb not in {verb_of(name) for name in tracked.names}:
            return False
        if self.slower_s and self._longest(tracked, now) < self.slower_s:
            return False
        return all(_has(tracked, word) for word in self.text.casefold().split())

    def names(self, request_id: str) -> bool:
        """Return whether it is, or may be, the request that is asked for by its id."""
        wanted = self.request
        return (
            not wanted
            or request_id == request_of(wanted)
            or any(each.startswith(wanted) for each in (request_id, bare_id(request_id)))
        )

    def _longest(self, tracked: Tracked, now: float) -> float:
        if not self.verb:
            return (now if tracked.is_running(now) else tracked.last) - tracked.begin
        return max((each.seconds for each in tracked.story().spans if each.name == self.verb), default=0.0)

    def __str__(self) -> str:
        parts = [f'"{self.text}"' if self.text else "", self.request, self.actor, self.verb]
        parts += [f"slower than {self.slower_s:g} s" if self.slower_s else "", "errors" if self.only_errors else ""]
        return ", ".join(part for part in parts if part)


def _has(tracked: Tracked, word: str) -> bool:
    if word in tracked.id.casefold() or any(word in name.casefold() for name in tracked.actors):
        return True
    if any(word in verb_of(name) for name in tracked.names):
        return True
    story = tracked.story()
    return any(word in each.casefold() for each in (story.model, story.script, story.error, tracked.error))
