"""What the directory knows of a fleet, as metrics: made anew at each scrape."""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from callboard.actors.protocol import Counters, Entry, Load
from callboard.actors.registration import DirectoryView
from callboard.bus import Node

Sample = tuple[list[str], float]

GAUGES_OF_ENGINES: tuple[tuple[str, str, Callable[[Load], float]], ...] = (
    ("num_requests_running", "Sequences that hold blocks in an engine.", lambda load: load.num_running),
    ("num_requests_waiting", "Sequences that wait for a place or for blocks.", lambda load: load.num_waiting),
    (
        "kv_cache_usage_perc",
        "Blocks in use of the engine's pool; 1 means all. What is only cached is not in use.",
        lambda load: (load.num_blocks - load.free_blocks) / load.num_blocks if load.num_blocks else 0.0,
    ),
)
COUNTERS_OF_ENGINES: tuple[tuple[str, str, Callable[[Counters], float]], ...] = (
    ("prompt_tokens", "Prompt tokens of the sequences generated here.", lambda counters: counters.num_prompt_tokens),
    (
        "computed_prompt_tokens",
        "Prompt tokens that went through the model here, also for other engines.",
        lambda counters: counters.num_computed_tokens,
    ),
    ("generation_tokens", "Tokens generated here.", lambda counters: counters.num_generated_tokens),
    ("num_preemptions", "Sequences that lost their blocks to others.", lambda counters: counters.num_preemptions),
)
COUNTERS_OF_POOLS: tuple[tuple[str, str, Callable[[Counters], float]], ...] = (
    (
        "prefix_cache_queries",
        "Tokens that were looked for in the prefix cache.",
        lambda counters: counters.num_queried_tokens,
    ),
    ("prefix_cache_hits", "Tokens that were found in the prefix cache.", lambda counters: counters.num_hit_tokens),
    ("kv_evicted_blocks", "Cached blocks that gave way to others.", lambda counters: counters.num_evicted_blocks),
    (
        "external_prefix_cache_hits",
        "Tokens whose KV was brought back from host memory or disk.",
        lambda counters: counters.num_tier_hit_tokens,
    ),
    ("kv_offload_load_bytes", "KV read from disk.", lambda counters: counters.num_tier_bytes_read),
    ("kv_offload_store_bytes", "KV written to disk.", lambda counters: counters.num_tier_bytes_written),
    (
        "kv_offload_dropped_blocks",
        "Cached blocks that were lost before a tier had them.",
        lambda counters: counters.num_tier_dropped_blocks,
    ),
    ("kv_sent_bytes", "KV written into other pools for remote_send.", lambda counters: counters.num_bytes_sent),
)
NO_ENDS = {"stop": 0, "length": 0, "abort": 0, "error": 0, "moved": 0}
"""How a sequence may end; shown before the first has, so that a rate has something to begin with."""


def gauge(stem: str, text: str, labels: list[str], samples: Iterable[Sample]) -> Metric:
    """Return the family ``callboard_STEM``."""
    family = GaugeMetricFamily(f"callboard_{stem}", text, labels=labels)
    for values, number in samples:
        family.add_metric(values, number)
    return family


def counter(stem: str, text: str, labels: list[str], samples: Iterable[Sample]) -> Metric:
    """Return the family ``callboard_STEM_total``."""
    family = CounterMetricFamily(f"callboard_{stem}", text, labels=labels)
    for values, number in samples:
        family.add_metric(values, number)
    return family


class FleetCollector(Collector):
    """The entries of the directory, as ``entries`` returns them."""

    def __init__(self, entries: Callable[[], tuple[Entry, ...]]) -> None:
        self._entries = entries

    def collect(self) -> Iterator[Metric]:
        entries = self._entries()
        yield from self._actors(entries)
        yield from self._engines([entry for entry in entries if entry.kind == "engine"])
        yield from self._pools([entry for entry in entries if entry.kind == "kv_manager"])
        yield from self._strangers(entries)

    def _actors(self, entries: tuple[Entry, ...]) -> Iterator[Metric]:
        named = [(entry, [entry.name, entry.kind]) for entry in entries]
        is_ready = [(labels, float(entry.state == "ready")) for entry, labels in named]
        started = [(labels, entry.started) for entry, labels in named if entry.started]
        labels = ["actor", "kind"]
        yield gauge("actor_ready", "1 for an actor that is ready.", labels, is_ready)
        yield gauge("actor_start_time_seconds", "When an actor started, in seconds since 1970.", labels, started)
        scripts = [entry for entry in entries if entry.kind == "router"]
        yield gauge(
            "router_info",
            "Which script a router runs.",
            ["router", "script", "version"],
            [([each.name, each.detail.get("script", ""), each.detail.get("version", "")], 1.0) for each in scripts],
        )

    def _engines(self, engines: list[Entry]) -> Iterator[Metric]:
        named = [(engine, [engine.model, engine.name]) for engine in engines]
        labels = ["model_name", "engine"]
        managers = [engine.manager.actor if engine.manager else "" for engine in engines]
        yield gauge(
            "engine_info",
            "What an engine is, and whose pool it computes in.",
            [*labels, "roles", "device", "node", "kv_manager"],
            [
                ([*names, "+".join(engine.roles), engine.device, engine.address.node, manager], 1.0)
                for (engine, names), manager in zip(named, managers, strict=True)
            ],
        )
        for stem, text, of_load in GAUGES_OF_ENGINES:
            yield gauge(stem, text, labels, [(names, of_load(engine.load)) for engine, names in named])
        for stem, text, of in COUNTERS_OF_ENGINES:
            yield counter(stem, text, labels, [(names, of(engine.counters)) for engine, names in named])
        yield counter(
            "request_success",
            "Sequences that an engine has ended, by how: stop, length, abort (the client left, too), error.",
            [*labels, "finished_reason"],
            [
                ([*names, reason], number)
                for engine, names in named
                for reason, number in {**NO_ENDS, **engine.counters.num_finished}.items()
            ],
        )

    def _pools(self, pools: list[Entry]) -> Iterator[Metric]:
        labels = ["kv_manager"]
        states = [([pool.name, state], float(number)) for pool in pools for state, number in _blocks(pool.load).items()]
        yield gauge("kv_blocks", "Blocks of a pool, by what they are.", [*labels, "state"], states)
        for stem, text, of in COUNTERS_OF_POOLS:
            yield counter(stem, text, labels, [([pool.name], of(pool.counters)) for pool in pools])

    def _strangers(self, entries: tuple[Entry, ...]) -> Iterator[Metric]:
        strangers: dict[str, int] = {}
        for entry in entries:
            node = entry.address.node
            strangers[node] = max(entry.num_strangers, strangers.get(node, 0))
        yield counter(
            "bus_strangers",
            "Connections that a node has turned away, because they did not show the fleet's keys.",
            ["node"],
            [([node], number) for node, number in strangers.items()],
        )


class NodeCollector(Collector):
    """The links of a frontend's node, and what it hears of the directory."""

    def __init__(self, node: Node, view: DirectoryView) -> None:
        self._node = node
        self._view = view

    def collect(self) -> Iterator[Metric]:
        own = [self._node.name]
        num_links, num_refused = self._node.num_links, self._node.num_refused
        yield gauge("bus_links", "Nodes that the frontend's node is linked to.", ["node"], [(own, num_links)])
        text = "Peers and batches that the frontend's node has turned away."
        yield counter("bus_refused", text, ["node"], [(own, num_refused)])
        is_fresh = float(not self._view.is_stale)
        yield gauge("directory_up", "1 while the frontend hears of the directory.", [], [([], is_fresh)])


def _blocks(load: Load) -> dict[str, int]:
    return {
        "free": load.free_blocks - load.cached_blocks,
        "cached": load.cached_blocks,
        "used": load.num_blocks - load.free_blocks - load.quarantined_blocks,
        "quarantined": load.quarantined_blocks,
    }
