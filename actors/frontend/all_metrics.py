"""``/metrics`` of several frontends at one port: whichever is scraped asks the others, and tells of all.

What each has counted is a series of its own, with a label ``frontend``: sums would shrink whenever one was restarted or
did not answer, and rates of such a sum be wrong. Of one that does not answer the series are missing in that scrape.
What the directory knows is asked of it at each scrape: of two views of it the one that is scraped next may be older.
"""

import asyncio
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client.core import Metric

from callboard.actors.frontend_protocol import FrontendMetrics, GetFrontendMetrics, MetricFamily, MetricSample
from callboard.actors.protocol import Entry, ListEntries
from callboard.actors.registration import DirectoryView
from callboard.bus import BusError, Node, Ref

ASK_S = 1.0
"""How long another frontend may take to answer: scrapers wait for 10 s."""
LABEL = "frontend"


class OtherFrontends:
    """The frontends of ``names`` but for ``own``, as far as the directory knows them; ``view`` stands in for it."""

    def __init__(self, node: Node, view: DirectoryView, directory: Ref, *, names: Iterable[str], own: str) -> None:
        self._node = node
        self._view = view
        self._directory = directory
        self._names = frozenset(names) - {own}
        self._last: tuple[Entry, ...] = ()

    def ready(self) -> set[str]:
        """Return the names of those that accept connections, as the view has it."""
        return {each.name for each in self._view.entries("frontend") if self._is_other(each) and each.state == "ready"}

    def last_entries(self) -> tuple[Entry, ...]:
        """Return the entries of the directory that ``metrics`` has last heard."""
        return self._last

    async def metrics(self) -> dict[str, FrontendMetrics]:
        """Return what each has counted that answers, by its name."""
        try:
            self._last = (await self._directory.ask(ListEntries(), timeout=ASK_S)).entries
        except BusError:
            self._last = self._view.entries()
        entries = [entry for entry in self._last if self._is_other(entry)]
        answers = await asyncio.gather(*(self._ask(entry) for entry in entries))
        return {entry.name: answer for entry, answer in zip(entries, answers, strict=True) if answer is not None}

    def _is_other(self, entry: Entry) -> bool:
        return entry.kind == "frontend" and entry.name in self._names

    async def _ask(self, entry: Entry) -> FrontendMetrics | None:
        try:
            return await self._node.ref(entry.address).ask(GetFrontendMetrics(), timeout=ASK_S)
        except BusError:
            return None


def told(families: Iterable[Metric]) -> FrontendMetrics:
    """Return families as one frontend tells them to another."""
    return FrontendMetrics(
        tuple(
            MetricFamily(
                family.name,
                family.documentation,
                family.type,
                tuple(MetricSample(each.name, dict(each.labels), float(each.value)) for each in family.samples),
            )
            for family in families
        )
    )


def merged(found: Mapping[str, FrontendMetrics]) -> Iterator[Metric]:
    """Yield the families of all frontends, each sample with the name of its frontend as a label."""
    families: dict[str, Metric] = {}
    for frontend in sorted(found):
        for family in found[frontend].families:
            one = families.setdefault(family.name, Metric(family.name, family.text, family.kind))
            for sample in family.samples:
                one.add_sample(sample.name, {LABEL: frontend, **sample.labels}, sample.value)
    yield from families.values()
