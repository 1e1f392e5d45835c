"""What a seed stands for: the strategies that ship, deaths and nothing else, and what people change meanwhile.

Each is drawn apart: what it adds leaves the rest of a seed as it was.
"""

from dataclasses import replace
from random import Random
from typing import Any

import msgspec

from .schedule import LOAD_S, OWN_SCRIPTS, ROLES, Change, Schedule, death_of, draw_plain

STRATEGIES: dict[str, dict[str, Any]] = {
    "adaptive": {"parts": 3},
    "balanced": {"ratio": 0.5},
    "chain": {"min_range": 8},
    "disaggregate": {},
    "least_loaded": {},
    "migrate": {"min_hits_per_s": 0.01},
    "prefix_aware": {},
    "round_robin": {},
    **{path: {} for path in OWN_SCRIPTS},
}
"""All that ship and the tests' own, with options for prompts as short as these."""
NAMES = tuple(STRATEGIES)


def draw(seed: int) -> Schedule:
    """Return what a seed stands for."""
    schedule = _with_long_answers(_with_a_strategy(draw_plain(seed)))
    return _with_changes(_with_room(_with_deaths_alone(schedule)))


def _with_a_strategy(schedule: Schedule) -> Schedule:
    rng = Random(f"strategies/{schedule.seed}")
    if rng.random() < 0.3:
        return schedule
    name = rng.choice(NAMES)
    return replace(schedule, script=name, options=STRATEGIES[name])


def _with_long_answers(schedule: Schedule) -> Schedule:
    """Have answers take a while in some fleets: deaths and hand-overs come in the midst of them."""
    rng = Random(f"answers/{schedule.seed}")
    if rng.random() < 0.5:
        return schedule
    simulation = msgspec.structs.replace(schedule.engine["simulated"], seconds_per_step=rng.choice([0.01, 0.03]))
    requests = []
    for each in schedule.requests:
        sampling = msgspec.structs.replace(each.sampling, max_tokens=rng.randrange(8, 60))
        requests.append(replace(each, sampling=sampling))
    return replace(schedule, engine=schedule.engine | {"simulated": simulation}, requests=tuple(requests))


def _with_deaths_alone(schedule: Schedule) -> Schedule:
    """Have only engines and managers die in some fleets: then every request must end well."""
    rng = Random(f"deaths/{schedule.seed}")
    if rng.random() < 0.6 or not schedule.faults:
        return schedule
    faults = tuple(death_of(rng, schedule) for _ in range(rng.choice([1, 1, 2, 3])))
    wires_break = None if schedule.wires_break is None else 0.0
    weather = replace(schedule.weather, retry_rate=0.0)
    return replace(schedule, faults=faults, weather=weather, wires_break=wires_break)


def _with_room(schedule: Schedule) -> Schedule:
    """Have room where all must end well: a prompt with the tokens behind which it goes on must fit twice, too."""
    if schedule.may_fail:
        return schedule
    longest = max(len(each.prompt) + each.sampling.max_tokens for each in schedule.requests)
    num_blocks = max(schedule.num_blocks, 2 * (longest // schedule.engine["block_size"] + 2))
    return replace(schedule, num_blocks=num_blocks)


def _with_changes(schedule: Schedule) -> Schedule:
    rng = Random(f"changes/{schedule.seed}")
    if rng.random() < 0.5:
        return schedule
    kinds = ["swap", "swap", "canary", "shadow", "promote", "rollback"]
    if len(schedule.engines) > 1 and schedule.engines != ("p", "d"):
        kinds += ["drain", "drain", "drain", "serve", "roles", "roles"]
    changes = [_change(rng, schedule, rng.choice(kinds)) for _ in range(rng.choice([1, 2, 4, 8]))]
    return replace(schedule, changes=tuple(sorted(changes, key=lambda change: change.at_s)))


def _change(rng: Random, schedule: Schedule, kind: str) -> Change:
    at_s = rng.uniform(0.0, LOAD_S)
    if kind in ("swap", "canary", "shadow"):
        name = rng.choice(NAMES)
        return Change(kind, at_s, script=name, options=STRATEGIES[name])
    if kind in ("drain", "serve", "roles"):
        # Of one engine alone, which others can stand in for.
        engine = next(
            e for e in schedule.engines if sum(each[0] == e[0] or each in "ab" for each in schedule.engines) > 1
        )
        own = ROLES.get(engine[0], ("prefill", "decode"))
        return Change(kind, at_s, engine, rng.choice([(), ("prefill", "decode"), own, own[:1]]))
    return Change(kind, at_s)
