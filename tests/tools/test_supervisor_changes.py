"""The supervisor while its fleet serves: nodes are restarted because somebody asks, and taken out again."""

import asyncio
import os
import signal
from typing import Any

import msgspec
import pytest
from waiting import until

from callboard.actors.node_spec import ActorSpec, NodeSpec, RestartPolicy
from callboard.actors.supervisor import NodeFailed, NodeState, Supervisor


def spec(place: Any, name: str, class_path: str = "my_actors:Ping", **restart: Any) -> NodeSpec:
    endpoint, log = f"ipc://{place.folder}/{name}.sock", str(place.folder / f"{name}.log")
    policy = RestartPolicy(**{"backoff_s": 0.01, **restart})
    actors = (ActorSpec(name, class_path),)
    return NodeSpec("test", name, "actor", endpoint, actors, log, python_path=str(place.folder), restart=policy)


async def test_a_node_is_restarted_changed_and_removed_while_others_run(place: Any) -> None:
    states: list[NodeState] = []
    fleet = Supervisor(environment=place.env, on_change=states.append)
    try:
        await fleet.start([spec(place, "a"), spec(place, "b")])
        pids = {name: state.pid for name, state in fleet.states.items()}

        await asyncio.gather(fleet.restart("a"), fleet.restart("a"))  # Asked twice, it happens once.
        assert fleet.states["a"].state == "ready"
        assert fleet.states["a"].pid != pids["a"]
        assert fleet.states["a"].num_restarts == 1
        assert fleet.states["b"].pid == pids["b"]

        # What it is changed to holds from its next start on, also where that is a crash's.
        other = msgspec.structs.replace(spec(place, "a"), actors=(ActorSpec("other", "my_actors:Ping"),))
        fleet.change(other)
        before = fleet.states["a"].pid
        os.kill(before, signal.SIGKILL)
        await until(lambda: fleet.states["a"].state == "ready" and fleet.states["a"].pid != before)
        assert fleet.spec("a") == other

        # A restart that fails says why, and the policy goes on trying.
        fleet.change(spec(place, "a", "my_actors:Refusing", max_restarts=1))
        with pytest.raises(NodeFailed, match="the moon is not in the right phase"):
            await fleet.restart("a")
        await until(lambda: fleet.states["a"].state == "failed")

        # And one that was given up is started by the next.
        fleet.change(spec(place, "a"))
        await fleet.restart("a")
        assert fleet.states["a"].state == "ready"

        await fleet.remove("a")
        await fleet.remove("a")
        assert set(fleet.states) == {"b"}
        assert fleet.spec("a") is None
        assert states[-1].state == "stopped"
        assert fleet.states["b"].pid == pids["b"]
        assert not fleet.fatal.is_set()
    finally:
        await fleet.stop()
    assert fleet.error is None
    assert not place.processes()
