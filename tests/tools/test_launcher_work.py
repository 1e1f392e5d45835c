"""What a launcher does for commands at the same time: nothing waits for what is done to something else."""

import asyncio
import threading
from typing import Any

import pytest
from waiting import PATIENCE_S, until

from callboard.actors.node_spec import ActorSpec, NodeSpec
from callboard.actors.supervisor import Supervisor
from callboard.tools.errors import CliError, FleetFileError
from callboard.tools.fleet_file import FleetFile, decode_fleet_file
from callboard.tools.launcher_calls import AddEngines, Call, KeepEngine, RestartNode, Said
from callboard.tools.launcher_work import LauncherWork
from callboard.tools.plan import Plan
from callboard.tools.turns import Turns

FLEET = """\
name = "test"
[models.tiny]
path = "model"
[[engine]]
name = "e"
count = 2
"""

ANYTHING = """\
class Anything:
    def __init__(self, **config):
        pass
"""


def engine(place: Any, name: str) -> NodeSpec:
    """Return what stands for an engine: its process starts in no time."""
    endpoint, log = f"ipc://{place.folder}/{name}.sock", str(place.folder / f"{name}.log")
    return NodeSpec(
        "test", name, "engine", endpoint, (ActorSpec(name, "takes_all:Anything"),), log, python_path=str(place.folder)
    )


class Work:
    """A launcher's work with two nodes that run, which may plan for more only when it is told to, and in vain."""

    def __init__(self, place: Any, supervisor: Supervisor) -> None:
        self.supervisor = supervisor
        self.may_plan = threading.Event()
        self.num_plans = 0
        file = decode_fleet_file(FLEET, source="fleet.toml", base=place.folder)
        self.work = LauncherWork(
            file, supervisor, host="", plan=self._plan, check=lambda growth, free: None, tail=lambda name: ""
        )

    def _plan(self, file: FleetFile) -> Plan:
        self.num_plans += 1
        assert self.may_plan.wait(PATIENCE_S)
        raise FleetFileError(["fleet.toml: there is no room for more"])

    def begin(self, call: Call) -> "asyncio.Task[Said]":
        return asyncio.ensure_future(self.work.serve(call, lambda text: None))


async def test_what_is_done_to_other_engines_does_not_wait_for_a_long_addition(place: Any) -> None:
    place.model()
    place.write(ANYTHING, "takes_all.py")
    supervisor = Supervisor(environment=place.env)
    try:
        await supervisor.start([engine(place, "e-0"), engine(place, "e-1")])
        pid = supervisor.states["e-0"].pid
        work = Work(place, supervisor)
        adding = work.begin(AddEngines("e"))
        await until(lambda: work.num_plans == 1)
        second = work.begin(AddEngines("e", name="other"))

        assert (await work.begin(KeepEngine("e-0", roles=("decode",)))).names == ("e-0",)
        restarted = await asyncio.gather(*(work.begin(RestartNode(name)) for name in ("e-0", "e-1")))
        assert [said.names for said in restarted] == [("e-0",), ("e-1",)]
        assert supervisor.states["e-0"].pid not in (0, pid)
        spec = supervisor.spec("e-0")
        assert spec is not None
        assert spec.actors[0].config["roles"] == ["decode"]
        with pytest.raises(CliError, match='no "e-7" here'):
            await work.begin(RestartNode("e-7"))
        assert not adding.done()
        assert work.num_plans == 1, "who adds chooses among what is there when the one before is done"

        work.may_plan.set()
        ends = await asyncio.gather(adding, second, return_exceptions=True)
        assert [str(end) for end in ends] == ["there is no room for more"] * 2
        assert work.num_plans == 2
        assert set(supervisor.states) == {"e-0", "e-1"}
    finally:
        await supervisor.stop()
    assert not place.processes()


async def test_of_one_thing_there_is_one_turn_at_a_time_in_order_and_what_is_over_leaves_nothing() -> None:
    turns, log = Turns(), list[str]()

    async def take(who: str, *names: str) -> None:
        async with turns.of(*names):
            log.append(f"{who} begins")
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            log.append(f"{who} ends")

    await asyncio.gather(take("one", "a"), take("two", "a"), take("three", "b"), take("four", "b", "a", "a"))
    assert [word for word in log if not word.startswith("three")] == [
        f"{who} {what}" for who in ("one", "two", "four") for what in ("begins", "ends")
    ]
    assert log.index("three begins") < log.index("one ends")
    waiting = asyncio.ensure_future(take("nobody", "a"))
    async with turns.of("a"):
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
    assert not turns._locks
