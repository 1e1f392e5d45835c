"""Whoever dies, hangs or is cut off at any message of a hand-over: every request brings its tokens, nothing leaks."""

import os
from pathlib import Path

import pytest
from chaos.harness import Outcome, run_schedule
from chaos.schedule import Asking, Fault, Schedule, Trigger

from callboard.actors.engine.simulated import Simulation
from callboard.actors.protocol import SamplingParams
from callboard.bus.links import LinkConfig
from callboard.bus.transports.sim import Weather

SCRIPT = str(Path(__file__).parent / "scripts" / "to_and_fro.py")
SIMULATION = Simulation(num_layers=2, seconds_per_step=0.01, seconds_per_prefill_token=0.0002)
NUM_REQUESTS = 3

MESSAGES = {
    "d1": ("received SendKv", "sent SendHeld", "received Freeze", "received StartGenerate", "sent Admit"),
    "d2": ("received SendKv", "received Freeze", "received StartGenerate", "sent Admit", "sent Finish"),
    "kv-d1": ("received SendHeld", "sent OpenWrite", "sent CloseWrite", "received PrepRecv"),
    "kv-d2": ("received PrepRecv", "received OpenWrite", "received CloseWrite", "received Admit", "received Release"),
    "control": ("sent SendKv", "sent Freeze", "sent StartGenerate"),
}
MOMENTS = [(node, *each.split()) for node, messages in MESSAGES.items() for each in messages]
KINDS, COUNTS = ("kill", "pause", "stop"), (1, 2, 5)
ALL_DEATHS = [(kind, count, *moment) for moment in MOMENTS for kind in KINDS for count in COUNTS]
NUM_EACH = len(KINDS) * len(COUNTS)
SOME_DEATHS = [ALL_DEATHS[NUM_EACH * index + index % NUM_EACH] for index in range(len(MOMENTS))]
DEATHS = ALL_DEATHS if os.environ.get("CALLBOARD_LONG") else SOME_DEATHS
"""One of each moment, in turn with each kind and count; all of them where CALLBOARD_LONG is set."""


def schedule_of(*faults: Fault, seed: int = 1, is_shared: bool = False, num_blocks: int = 96) -> Schedule:
    sampling = SamplingParams(max_tokens=24, ignore_eos=True, temperature=0.7, seed=5)
    requests = tuple(
        Asking(f"r{i}", "client", 0.02 * i, tuple(range(7 * i, 7 * i + 21 + 9 * i)), sampling)
        for i in range(NUM_REQUESTS)
    )
    return Schedule(
        seed=seed,
        engines=("d1", "d2"),
        is_shared=is_shared,
        script=SCRIPT,
        num_blocks=num_blocks,
        lease_s=2.0,
        engine={"block_size": 4, "max_num_batched_tokens": 64, "simulated": SIMULATION},
        links=LinkConfig(ping_s=0.4, silent_s=1.0, hello_s=1.0, dial_s=0.5),
        weather=Weather(max_s=0.001),
        is_one_host=True,
        requests=requests,
        faults=faults,
    )


def passed(outcome: Outcome, *, may_fail: bool = False) -> None:
    assert not outcome.problems, "\n".join([*outcome.problems, *outcome.log[-400:]])
    assert may_fail or not outcome.num_failed, outcome


@pytest.mark.parametrize("is_shared", [False, True])
def test_nothing_goes_wrong_where_nobody_dies(is_shared: bool) -> None:
    outcome = run_schedule(schedule_of(is_shared=is_shared), with_log=True)
    passed(outcome)
    assert sum("['Frozen'" in line for line in outcome.log) >= 6, "hardly anything was handed over"


@pytest.mark.parametrize(("kind", "count", "node", "direction", "message"), DEATHS)
def test_every_request_is_finished_whoever_dies_when(
    kind: str, count: int, node: str, direction: str, message: str
) -> None:
    trigger = Trigger(message=message, direction=direction, count=count, is_after=count == 2)
    outcome = run_schedule(schedule_of(Fault(kind, node, trigger, seconds=0.3 if kind != "pause" else 3.0)))
    passed(outcome, may_fail=node == "control")
    assert outcome.faults == {kind: 1}, "the moment never came"
