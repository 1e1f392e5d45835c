"""What is shown of all that is told: ``--request``, ``--actor``, ``--verb``, ``--slower``, ``--errors``."""

import argparse
import difflib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from callboard.router.spans import request_of
from callboard.tools.errors import CliError
from callboard.tools.units import parse_duration

from .past import resolve
from .story import CATEGORY_OF, verb_of
from .told import MESSAGES, Told


@dataclass(frozen=True, slots=True)
class Filter:
    """None and False let everything through."""

    request: str | None = None
    actor: str | None = None
    verb: str | None = None
    slower_s: float | None = None
    errors: bool = False

    def takes(self, told: Told) -> bool:
        """Say whether something is shown."""
        if self.request is not None and not self.takes_request(told.request_id):
            return False
        if self.actor is not None and self.actor not in (told.source, told.target, told.event.record.actor):
            return False
        if self.verb is not None and told.verb != self.verb:
            return False
        if self.slower_s is not None and (told.took_s is None or told.took_s < self.slower_s):
            return False
        return not self.errors or bool(told.error)

    def takes_request(self, request_id: str) -> bool:
        """Say whether a request, or a sequence of one, is shown."""
        return self.request is None or self.request in (request_id, request_of(request_id))

    def checked(self, *, requests: Collection[str], actors: Iterable[str], verbs: Iterable[str]) -> "Filter":
        """Return this with the request's full id. Raises CliError for names that nobody has."""
        if self.actor is not None:
            _check("actor", self.actor, {*actors} - {""}, "see callboard ps")
        if self.verb is not None:
            _check("verb", self.verb, {*verbs, *known_verbs()} - {""}, "such as prep_recv, remote_send, prefill")
        return self if self.request is None else replace(self, request=resolve(self.request, requests))


def filter_of(arguments: argparse.Namespace) -> Filter:
    """Return what the command line asks for. Raises CliError."""
    try:
        slower = None if arguments.slower is None else parse_duration(arguments.slower)
    except ValueError as error:
        raise CliError(f"--slower {error}") from None
    verb = None if arguments.verb is None else verb_of(arguments.verb).replace("-", "_")
    return Filter(arguments.request, arguments.actor, verb, slower, arguments.errors)


def known_verbs() -> set[str]:
    """Return the names of all messages and phases of Callboard's own."""
    return {*MESSAGES, *CATEGORY_OF, "http", "attempt"}


def _check(what: str, name: str, known: Collection[str], hint: str) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
    raise CliError(f'there is no {what} "{name}": {"did you mean " + " or ".join(near) + "?" if near else hint}')
