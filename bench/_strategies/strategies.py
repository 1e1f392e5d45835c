"""What is compared: baselines, static strategies, one that chooses. Each is a script that ships, and where it runs."""

import hashlib
from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from callboard.router.script import find_script, shipped_scripts

Kind = Literal["baseline", "static", "adaptive"]


class Strategy(msgspec.Struct, frozen=True):
    """A script with options. ``label`` is what people read."""

    name: str
    label: str
    script: str
    kind: Kind = "static"
    options: dict[str, Any] = {}
    deployment: Literal["pair", "both"] = "pair"
    """Two engines of a core each, or one engine with both cores."""
    roles: Literal["any", "split"] = "any"
    """Whether both engines take prompts and generate, or one of them each."""
    tuned_as: Literal["data parallel", "1P1D", "one engine"] = "data parallel"
    """Whose best token budget it runs with."""


STRATEGIES = (
    Strategy("one", "one engine, 2 cores", "least_loaded", "baseline", {}, "both", tuned_as="one engine"),
    Strategy("round_robin", "data parallel: round_robin", "round_robin", "baseline"),
    Strategy("least_loaded", "data parallel: least_loaded", "least_loaded", "baseline"),
    Strategy("disaggregate", "1P1D: disaggregate", "disaggregate", "baseline", roles="split", tuned_as="1P1D"),
    Strategy("balanced-10", "balanced 0.1", "balanced", options={"ratio": 0.1}, roles="split"),
    Strategy("balanced-30", "balanced 0.3", "balanced", options={"ratio": 0.3}, roles="split"),
    Strategy("adaptive", "adaptive", "adaptive", "adaptive"),
    Strategy("prefix_aware", "prefix_aware", "prefix_aware"),
    Strategy("migrate", "migrate", "migrate"),
    Strategy("chain", "chain", "chain"),
)
TUNED = {"data parallel": "least_loaded", "1P1D": "disaggregate", "one engine": "one"}
"""The strategy that a deployment's token budget is tuned with."""
DATA_PARALLEL = ("round_robin", "least_loaded")


def strategies_here(only: list[str] | None = None) -> list[Strategy]:
    """Return those whose scripts ship, or of these the ones that are named. Raises KeyError for a name of none."""
    known = {strategy.name: strategy for strategy in STRATEGIES}
    chosen = [known[name] for name in only] if only else list(STRATEGIES)
    shipped = shipped_scripts()
    return [strategy for strategy in chosen if strategy.script in shipped]


def digests_of(strategies: Iterable[Strategy]) -> dict[str, str]:
    """Return the digests of their scripts' texts: a run that goes on must go on with the same ones."""
    return {each.script: hashlib.sha256(find_script(each.script).read_bytes()).hexdigest()[:12] for each in strategies}
