"""The supervisor alone: every start of a manager has a new pool, and the stop is in order."""

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec
import pytest
from waiting import until

from callboard.actors.child import child_environment
from callboard.actors.node_spec import ActorSpec, NodeKind, NodeSpec, RestartPolicy
from callboard.actors.supervisor import NodeFailed, NodeState, Supervisor

POOL_ACTOR = '''\
import os

from callboard.actors.actor import Actor


class Pool(Actor):
    """Says how large its pool is and what is in it, then writes."""

    def __init__(self, pool_fd, report):
        self.pool_fd, self.report = pool_fd, report

    async def start(self):
        found = os.fstat(self.pool_fd).st_size, os.pread(self.pool_fd, 1, 0)[0]
        with open(self.report, "a") as file:
            print(*found, file=file)
        os.pwrite(self.pool_fd, bytes([7]), 0)
'''


def spec(place: Any, name: str, kind: NodeKind, class_path: str, **options: Any) -> NodeSpec:
    endpoint, log = f"ipc://{place.folder}/{name}.sock", str(place.folder / f"{name}.log")
    options.setdefault("restart", RestartPolicy(backoff_s=0.01))
    actors = (ActorSpec(name, class_path),)
    return NodeSpec("test", name, kind, endpoint, actors, log, python_path=str(place.folder), **options)


@asynccontextmanager
async def supervisor(place: Any, states: list[NodeState], **options: Any) -> AsyncIterator[Supervisor]:
    made = Supervisor(environment=place.env, on_change=states.append, **options)
    try:
        yield made
    finally:
        await made.stop()
        assert not place.processes()


async def test_a_manager_that_comes_back_has_a_new_pool(place: Any) -> None:
    # An engine that still maps the old one would write into blocks of the new one.
    (place.folder / "pools.py").write_text(POOL_ACTOR)
    states: list[NodeState] = []
    report = place.folder / "report"
    async with supervisor(place, states) as fleet:
        node = spec(place, "kv", "kv_manager", "pools:Pool", pool_bytes=4096)
        actor = msgspec.structs.replace(node.actors[0], config={"report": str(report)})
        await fleet.start([msgspec.structs.replace(node, actors=(actor,))])
        os.kill(fleet.states["kv"].pid, signal.SIGKILL)
        await until(lambda: sum(each.state == "ready" for each in states) == 2)
        assert report.read_text() == "4096 0\n" * 2
    assert "killed by SIGKILL" in next(each.detail for each in states if each.state == "restarting")


async def test_nodes_stop_kind_by_kind(place: Any) -> None:
    states: list[NodeState] = []
    async with supervisor(place, states) as fleet:
        kinds: list[NodeKind] = ["control", "frontend", "kv_manager", "engine", "actor"]
        await fleet.start([spec(place, f"a{kind}", kind, "my_actors:Ping") for kind in kinds])
    stopped = [each.kind for each in states if each.state == "stopped"]
    assert stopped == ["frontend", "actor", "engine", "kv_manager", "control"]


async def test_a_node_that_hangs_is_killed_after_the_grace(place: Any) -> None:
    states: list[NodeState] = []
    async with supervisor(place, states, grace_s=0.2) as fleet:
        await fleet.start([spec(place, "ping", "actor", "my_actors:Ping")])
        os.kill(fleet.states["ping"].pid, signal.SIGSTOP)


async def test_a_node_that_is_not_ready_in_time_fails(place: Any) -> None:
    async with supervisor(place, [], ready_s=1.0) as fleet:
        with pytest.raises(NodeFailed, match="ping: it was not ready within 1 s"):
            await fleet.start([spec(place, "ping", "actor", "my_actors:NeverReady")])


async def test_an_essential_node_that_is_given_up_is_fatal(place: Any) -> None:
    states: list[NodeState] = []
    async with supervisor(place, states) as fleet:
        once = spec(place, "ping", "actor", "my_actors:Ping", is_essential=True)
        await fleet.start([once])

        def is_fatal_or_killed_again() -> bool:
            if fleet.states["ping"].state == "ready":
                with suppress(ProcessLookupError):  # It is dead, and the supervisor about to say so.
                    os.kill(fleet.states["ping"].pid, signal.SIGKILL)
            return fleet.fatal.is_set()

        await until(is_fatal_or_killed_again)
    assert fleet.states["ping"].num_restarts == once.restart.max_restarts


async def test_the_last_of_a_kind_that_is_needed_is_fatal_when_it_is_given_up(place: Any) -> None:
    async with supervisor(place, []) as fleet:
        options = {"restart": RestartPolicy(is_enabled=False), "is_needed_of_its_kind": True}
        await fleet.start([spec(place, name, "frontend", "my_actors:Ping", **options) for name in ("one", "two")])
        os.kill(fleet.states["one"].pid, signal.SIGKILL)
        await until(lambda: fleet.states["one"].state == "failed")
        assert not fleet.fatal.is_set()
        os.kill(fleet.states["two"].pid, signal.SIGKILL)
        await until(fleet.fatal.is_set)


def test_a_run_directory_belongs_to_one_at_a_time(place: Any) -> None:
    from callboard.actors.run_dir import is_locked, remove_run_dir, try_lock

    folder = place.folder / "fleet"
    lock = try_lock(folder)
    assert lock is not None
    assert is_locked(folder)
    assert try_lock(folder) is None
    (folder / "logs").mkdir()
    remove_run_dir(folder)
    successor = try_lock(folder)
    assert successor is not None
    os.close(lock)
    assert is_locked(folder)
    os.close(successor)
    assert not is_locked(folder)


CHATTY_ACTOR = '''\
import os

from callboard.actors.actor import Actor


class Chatty(Actor):
    """Fails with a sentence that is no text and has no end."""

    async def start(self):
        raise RuntimeError("\\ud800" + "x" * 1_000_000)
'''


async def test_whatever_a_node_says_of_its_failure_the_supervisor_reads_on(place: Any) -> None:
    (place.folder / "chatty.py").write_text(CHATTY_ACTOR)
    async with supervisor(place, []) as fleet:
        with pytest.raises(NodeFailed, match=r"RuntimeError: .xxx"):
            await fleet.start([spec(place, "chatty", "actor", "chatty:Chatty")])
        assert fleet.error is None


def test_threads_of_a_node_sleep_soon_unless_the_user_says_otherwise() -> None:
    assert child_environment({}, 2)["GOMP_SPINCOUNT"] == "10000"
    assert child_environment({"GOMP_SPINCOUNT": "7"}, 2)["GOMP_SPINCOUNT"] == "7"
    assert "GOMP_SPINCOUNT" not in child_environment({"OMP_WAIT_POLICY": "ACTIVE"}, 2)
