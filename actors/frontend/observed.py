"""What is noted of each request at the HTTP door: how it ended, and when its tokens came.

A token costs a look at the clock; gaps between tokens are sorted into histograms a few dozen at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from callboard.actors.protocol import Usage
from callboard.actors.stats_protocol import FrontendStats, ModelStats

from .generation import Sequence as Choice
from .histogram import WINDOW_S, Histogram, Totals, percentiles

CLIENT_LEFT = 499
"""The status of a request whose client did not wait for the answer, as nginx has it."""

# vLLM's boundaries, and some below them for models that answer faster.
TTFT_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
ITL_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0),
)
REQUEST_S = (
    *(0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
NUM_TOKENS = tuple(float(digit * 10**exponent) for exponent in range(6) for digit in (1, 2, 5))


class ModelMetrics:
    """What is noted of the requests for one model; of "", those for none that is served."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.num_in_flight = 0
        self.num_ended = 0
        self.num_failed = 0
        self.num_left = 0
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self.ttft = Histogram(TTFT_S)
        self.itl = Histogram(ITL_S)
        self.e2e = Histogram(REQUEST_S)
        self.tpot = Totals(ITL_S)
        self.queue = Totals(REQUEST_S)
        self.prefill = Totals(REQUEST_S)
        self.decode = Totals(REQUEST_S)
        self.prompt_tokens = Totals(NUM_TOKENS)
        self.generation_tokens = Totals(NUM_TOKENS)

    def billed(self, usage: Usage) -> None:
        """Note what an engine says of a sequence."""
        self.queue.add(usage.queue_s)
        self.prefill.add(usage.prefill_s)
        self.decode.add(usage.decode_s)


class Observed:
    """One request under observation, from its arrival on."""

    def __init__(self, metrics: "RequestMetrics", endpoint: str, now: float) -> None:
        self.status = CLIENT_LEFT
        """Of the answer, or of the error that ended it."""
        self.model = metrics.models[""]
        self._models = metrics.models
        self.endpoint = endpoint
        self._now = metrics.now
        self._begin = now
        self._status: int | None = None
        self._num_prompt_tokens = 0
        self._choices: Sequence[Choice] = ()
        self.model.num_in_flight += 1

    def watching(self, send: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Return an ASGI ``send`` that notes the status, once all of the answer has been taken."""

        async def watched(event: Any) -> None:
            if event["type"] == "http.response.start":
                self._status = event["status"]
            await send(event)
            if event["type"] == "http.response.body" and not event.get("more_body", False):
                assert self._status is not None
                self.status = self._status

        return watched

    def is_for(self, model: str) -> None:
        """Note which model is asked for; one that is not served counts as none."""
        self.model.num_in_flight -= 1
        self.model = self._models.get(model, self.model)
        self.model.num_in_flight += 1

    def serves(self, choices: Sequence[Choice], *, num_prompt_tokens: int) -> None:
        """Note what will be generated."""
        self._choices, self._num_prompt_tokens = choices, num_prompt_tokens

    def failed(self, status: int) -> None:
        """Note the error that ends an answer which has begun."""
        self._status = status

    def ended(self) -> None:
        """Note the end, however it came."""
        now, model = self._now(), self.model
        model.num_in_flight -= 1
        model.num_ended += 1
        model.num_failed += self.status >= 500
        model.num_left += self.status == CLIENT_LEFT
        model.num_prompt_tokens += self._num_prompt_tokens
        num_generated = sum(choice.text.num_tokens for choice in self._choices)
        model.num_generated_tokens += num_generated
        firsts = [choice.pace.first for choice in self._choices if choice.pace.first is not None]
        if firsts:
            model.ttft.observe((min(firsts) - self._begin,), now)
        for choice in self._choices:
            choice.pace.flush()
            first, last, num_tokens = choice.pace.first, choice.pace.last, choice.text.num_tokens
            if first is not None and last is not None and num_tokens > 1:
                model.tpot.add((last - first) / (num_tokens - 1))
            if choice.text.usage is not None:
                model.billed(choice.text.usage)
        if self.status == 200:
            model.e2e.observe((now - self._begin,), now)
            model.prompt_tokens.add(self._num_prompt_tokens)
            model.generation_tokens.add(num_generated)


class RequestMetrics:
    """All that is noted at one frontend. ``now`` gives seconds of its node's clock."""

    def __init__(self, models: Mapping[str, Any], now: Callable[[], float]) -> None:
        self.now = now
        self.models = {name: ModelMetrics(name) for name in ("", *models)}
        self.num_requests: dict[tuple[str, str, int], int] = {}
        """By model, endpoint and status."""

    @contextmanager
    def request(self, endpoint: str) -> Iterator[Observed]:
        """Observe a request that has just arrived, until the body is left."""
        observed = Observed(self, endpoint, self.now())
        try:
            yield observed
        finally:
            observed.ended()
            key = (observed.model.name, endpoint, observed.status)
            self.num_requests[key] = self.num_requests.get(key, 0) + 1

    def stats(self) -> FrontendStats:
        """Return what ``callboard top`` shows."""
        models = list(self.models.values())
        return FrontendStats(
            window_s=WINDOW_S,
            models=tuple(self._stats(model.name, [model]) for model in models if model.name),
            everything=self._stats("", models),
        )

    def _stats(self, name: str, models: list[ModelMetrics]) -> ModelStats:
        now = self.now()
        return ModelStats(
            name,
            sum(model.num_in_flight for model in models),
            sum(model.num_ended for model in models),
            sum(model.num_failed for model in models),
            sum(model.num_left for model in models),
            sum(model.num_prompt_tokens for model in models),
            sum(model.num_generated_tokens for model in models),
            percentiles([model.ttft for model in models], now),
            percentiles([model.itl for model in models], now),
            percentiles([model.e2e for model in models], now),
        )
