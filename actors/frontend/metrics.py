"""``/metrics``: what this frontend has noted of its requests, and what the directory says of engines and pools.

Names, units and labels are those of vLLM, with the prefix ``callboard_``. Nothing of a request's content is in them.
An engine's or a manager's counters begin at 0 with each start of it, and a frontend's with the frontend's.
Of several frontends whichever is scraped tells of all (all_metrics.py).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from litestar import Request, Response, get
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, choose_encoder, generate_latest
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from callboard.actors.frontend_protocol import FrontendMetrics
from callboard.bus import Node

from .all_metrics import OtherFrontends, merged, told
from .fleet_metrics import gauge
from .histogram import Totals
from .observed import ModelMetrics, RequestMetrics

HISTOGRAMS: tuple[tuple[str, str, Callable[[ModelMetrics], Totals]], ...] = (
    ("time_to_first_token_seconds", "From a request's arrival to its first token.", lambda m: m.ttft),
    (
        "inter_token_latency_seconds",
        "Between two tokens of a sequence, as they arrive at the frontend.",
        lambda m: m.itl,
    ),
    (
        "request_time_per_output_token_seconds",
        "Of a sequence, from its first token to its last, by the number of tokens between.",
        lambda m: m.tpot,
    ),
    (
        "e2e_request_latency_seconds",
        "From a request's arrival to the end of its answer, if that is 200.",
        lambda m: m.e2e,
    ),
    ("request_queue_time_seconds", "Of a sequence, at its engine until its first step.", lambda m: m.queue),
    (
        "request_prefill_time_seconds",
        "Of a sequence, from its engine's first step to its first token.",
        lambda m: m.prefill,
    ),
    ("request_decode_time_seconds", "Of a sequence, from its first token to its last.", lambda m: m.decode),
    ("request_prompt_tokens", "Tokens of the prompts of a request that was answered.", lambda m: m.prompt_tokens),
    ("request_generation_tokens", "Tokens of the answer to a request.", lambda m: m.generation_tokens),
)


class RequestCollector(Collector):
    """The requests of one frontend, as Prometheus wants them."""

    def __init__(self, metrics: RequestMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        models = [model for name, model in self._metrics.models.items() if name]
        for stem, text, of in HISTOGRAMS:
            family = HistogramMetricFamily(f"callboard_{stem}", text, labels=["model_name"])
            for model in models:
                totals = of(model)
                family.add_metric([model.name], totals.buckets(), totals.sum)
            yield family
        requests = CounterMetricFamily(
            "callboard_requests",
            "HTTP requests that have ended, by status; 499: the client left. Without model_name: none that is served.",
            labels=["model_name", "endpoint", "status"],
        )
        for (name, endpoint, status), count in sorted(self._metrics.num_requests.items()):
            requests.add_metric([name, endpoint, str(status)], count)
        yield requests
        yield gauge(
            "inflight_requests",
            "HTTP requests that are being answered.",
            ["model_name"],
            [([model.name], model.num_in_flight) for model in models],
        )


class Snapshot(Collector):
    """What was collected at one moment, to be encoded by another thread."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> list[Metric]:
        return self._families


class Exposition:
    """The metrics of one fleet, as text; collectors are asked at each scrape.

    ``own`` are of this frontend, ``fleet`` of all. With ``others`` it tells what each frontend has counted.
    """

    def __init__(
        self,
        node: Node,
        *,
        own: Sequence[Collector],
        fleet: Sequence[Collector] = (),
        others: OtherFrontends | None = None,
        name: str = "",
    ) -> None:
        self._node = node
        self._own = (*own, ProcessCollector(registry=None))
        self._fleet = tuple(fleet)
        self._others = others
        self._name = name

    def told(self) -> FrontendMetrics:
        """Return what this frontend has counted itself."""
        return told(self._collect(self._own))

    async def render(self, accept: str) -> tuple[bytes, str]:
        """Return the metrics and their content type: OpenMetrics for whoever accepts it, else Prometheus' text."""
        try:
            encode, content_type = choose_encoder(accept)
        except (ValueError, TypeError):  # A version that is none.
            encode, content_type = generate_latest, CONTENT_TYPE_PLAIN_0_0_4
        # Not on the loop: the text of some hundred engines takes longer than a token may be late.
        return await self._node.run_blocking(encode, Snapshot(await self._families())), content_type

    async def _families(self) -> list[Metric]:
        if self._others is None:
            return [*self._collect(self._own), *self._collect(self._fleet)]
        found = await self._others.metrics()
        return [*merged({self._name: self.told(), **found}), *self._collect(self._fleet)]

    def _collect(self, collectors: Sequence[Collector]) -> Iterator[Metric]:
        for collector in collectors:
            yield from collector.collect()


def metrics_route(exposition: Exposition) -> Any:
    """Return /metrics. It is open where the API wants keys, as those of other servers are: scrapers have none."""

    @get("/metrics", opt={"is_open": True})
    async def metrics(request: Request[Any, Any, Any]) -> Response[bytes]:
        body, content_type = await exposition.render(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    return metrics
