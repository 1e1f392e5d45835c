"""What frontends of one port ask each other, and what ``callboard restart`` asks of one. Fields: append only."""

import msgspec

from callboard.bus import Ask, Message, Refusal


class MetricSample(msgspec.Struct, frozen=True, array_like=True):
    """A number of a family, with its whole name (``_bucket``, ``_total``, ... behind that of the family)."""

    name: str
    labels: dict[str, str]
    value: float


class MetricFamily(msgspec.Struct, frozen=True, array_like=True):
    """A metric of Prometheus. ``kind`` is counter, gauge or histogram."""

    name: str
    text: str
    kind: str
    samples: tuple[MetricSample, ...]


class FrontendMetrics(Message, frozen=True):
    """What a frontend has counted itself."""

    families: tuple[MetricFamily, ...]


class GetFrontendMetrics(Ask[FrontendMetrics], frozen=True):
    """To a frontend: what have you counted? So whichever is scraped tells of all."""


class CannotDrain(Refusal):
    """A frontend that must go on accepting connections. Fields: frontend, reason."""

    sentence = "{frontend} cannot be drained: {reason}"


class Drained(Message, frozen=True):
    """All requests of a frontend have been answered. It accepts connections again after ``pause_s``, unless it ends."""

    num_requests: int
    """That had to be waited for."""
    pause_s: float


class DrainFrontend(Ask[Drained], frozen=True):
    """To one of several frontends: leave new connections to the others, and answer when all here is done.

    If whoever asks leaves before that, it accepts connections again.
    """
