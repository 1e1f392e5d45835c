"""What one frontend has asked of each router, as metrics."""

from collections.abc import Callable, Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from .fleet_metrics import counter, gauge
from .routers import RouterCounts, Routers

COUNTERS: tuple[tuple[str, str, Callable[[RouterCounts], float]], ...] = (
    ("router_sequences", "Sequences that a router was asked for; each of n choices is one.", lambda c: c.num_asked),
    (
        "router_reroutes",
        "Sequences that had to go on with another router, because this one died or was out of reach.",
        lambda c: c.num_lost,
    ),
    ("router_refusals", "Sequences that a router had no room for.", lambda c: c.num_refused),
)


class RouterCollector(Collector):
    """The routers as one frontend has them."""

    def __init__(self, routers: Routers) -> None:
        self._routers = routers

    def collect(self) -> Iterator[Metric]:
        known = {address.actor for address in self._routers.there()} | self._routers.counts.keys()
        named = [(name, self._routers.counts.get(name, RouterCounts())) for name in sorted(known)]
        text = "Sequences that a router is answering for this frontend."
        samples = [([name], float(counts.num_in_flight)) for name, counts in named]
        yield gauge("router_inflight_sequences", text, ["router"], samples)
        for stem, text, of in COUNTERS:
            yield counter(stem, text, ["router"], [([name], of(counts)) for name, counts in named])
