"""Who keeps too many blocks in quarantine for too long is killed by the launcher, and starts again."""

import asyncio
import signal
from pathlib import Path

import msgspec
import pytest
from hall import LEASE_S, LINKS, Hall, in_a_hall
from real_fleet import RealFleet, real_fleet
from waiting import PATIENCE_S, until

from callboard.actors.engine.simulated import Simulation
from callboard.actors.kv_manager import quarantine
from callboard.actors.node_spec import ActorSpec, NodeKind, NodeSpec, RestartPolicy
from callboard.actors.protocol import SamplingParams, StartGenerate
from callboard.bus import BusError
from callboard.kv.tokens import pack_tokens

Asked = list[tuple[str, str, str]]


def heard_of(hall: Hall) -> Asked:
    """Return the list of those that manager d wants killed."""
    asked: Asked = []
    hall.actors["d"].ask_to_kill = lambda *words: asked.append(words)
    return asked


def test_a_writer_that_stands_still_over_a_large_part_of_a_pool_is_to_be_killed() -> None:
    async def test(hall: Hall) -> None:
        asked = heard_of(hall)
        incarnation = hall.actors["p"].node.incarnation
        await hall.half_written()
        await asyncio.sleep(LINKS.silent_s + LEASE_S + 2 * LEASE_S)
        assert (await hall.stats("d")).quarantined == 3
        assert asked == [], "it may have been slow"
        await asyncio.sleep(2 * LEASE_S)
        ((node, named, why),) = asked
        assert (node, named) == ("p", incarnation)
        assert "keeps 3 of 6 blocks of d" in why
        await asyncio.sleep(4 * LEASE_S)
        assert len(asked) == 2, "nobody has done it: it is asked for again"

    in_a_hall(test)


@pytest.mark.parametrize("name", ["SHARE", "NUM_LEASES"])
def test_few_blocks_and_short_stays_are_no_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine, name, {"SHARE": 0.5, "NUM_LEASES": 100}[name])

    async def test(hall: Hall) -> None:
        asked = heard_of(hall)
        await hall.half_written()
        await asyncio.sleep(30 * LEASE_S)
        assert (await hall.stats("d")).quarantined == 3
        assert asked == []

    in_a_hall(test)


def test_a_writer_that_comes_back_in_time_is_left_alone() -> None:
    async def test(hall: Hall) -> None:
        asked = heard_of(hall)
        await hall.half_written()
        await asyncio.sleep(LINKS.silent_s + 3 * LEASE_S)
        assert (await hall.stats("d")).quarantined == 3
        hall.writer.resume()
        await asyncio.sleep(30 * LEASE_S)
        assert (await hall.stats("d")).quarantined == 0
        assert asked == []

    in_a_hall(test)


# ---- real processes ----------------------------------------------------------------------------------------------


ASKING = """\
import asyncio
from callboard.actors.actor import Actor


class Asking(Actor):
    "Asks for the end of nodes, by what its folder says."

    def __init__(self, folder):
        self.folder = folder

    async def start(self):
        self.spawn(self.ask())

    async def ask(self):
        from pathlib import Path
        while True:
            await asyncio.sleep(0.02)
            wanted = Path(self.folder) / f"{self.name}.kills"
            if self.ask_to_kill and wanted.exists():
                for line in wanted.read_text().splitlines():
                    self.ask_to_kill(*line.split(), "it is stuck")
                wanted.unlink()


class Named(Actor):
    "Writes down which start of its process it is in."

    def __init__(self, folder):
        self.folder = folder

    async def start(self):
        from pathlib import Path
        (Path(self.folder) / f"{self.name}.incarnation").write_text(self.node.incarnation)
"""


async def test_the_launcher_kills_what_a_kv_manager_names_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "asking.py").write_text(ASKING)

    def node(fleet: RealFleet, name: str, kind: NodeKind, class_name: str) -> NodeSpec:
        actor = ActorSpec(name, f"asking:{class_name}", {"folder": str(tmp_path)})
        made = fleet.node(name, kind, actor, python_path=str(tmp_path))
        return msgspec.structs.replace(made, restart=RestartPolicy(backoff_s=0.01))

    def incarnation(name: str) -> str:
        return (tmp_path / f"{name}.incarnation").read_text()

    def ask(name: str, *lines: str) -> Path:
        path = tmp_path / f"{name}.new"
        path.write_text("".join(line + "\n" for line in lines))
        return path.rename(tmp_path / f"{name}.kills")

    async with asyncio.timeout(3 * PATIENCE_S), real_fleet(tmp_path) as fleet:
        await fleet.start(
            node(fleet, "kv", "kv_manager", "Asking"),
            node(fleet, "e", "engine", "Named"),
            node(fleet, "mine", "actor", "Named"),
        )
        states = fleet.supervisor.states
        first = {name: states[name].pid for name in ("kv", "e", "mine")}
        refused = [f"e {incarnation('mine')}", f"mine {incarnation('mine')}", "nobody x", "kv x"]
        asked = ask("kv", *refused)
        await until(lambda: not asked.exists())
        fleet.signal("e", signal.SIGSTOP)
        asked = ask("kv", f"e {incarnation('e')}")
        await until(lambda: states["e"].num_restarts == 1 and states["e"].state == "ready")
        assert states["e"].pid != first["e"]
        assert {name: states[name].pid for name in ("kv", "mine")} == {name: first[name] for name in ("kv", "mine")}
        assert "asking the launcher to kill e: it is stuck" in fleet.log("kv")


async def test_an_engine_that_was_stopped_is_killed_and_its_blocks_come_back(tmp_path: Path) -> None:
    async with asyncio.timeout(3 * PATIENCE_S), real_fleet(tmp_path) as fleet:
        engine, manager = fleet.engine("a", Simulation(seconds_per_step=0.05), num_blocks=8)
        (actor,) = manager.actors
        actor = msgspec.structs.replace(actor, config={**actor.config, "lease_s": 0.2})
        policy = RestartPolicy(backoff_s=0.01)
        await fleet.start(
            msgspec.structs.replace(manager, actors=(actor,), silent_s=0.5),
            msgspec.structs.replace(engine, restart=policy, silent_s=0.5),
        )
        ref, states = fleet.client.ref(fleet.address("a", "a")), fleet.supervisor.states
        message = StartGenerate("r", 0, pack_tokens(range(60)), SamplingParams(max_tokens=60, ignore_eos=True))
        async with ref.stream(message, timeout=30) as tokens:
            await anext(tokens)
            fleet.signal("a", signal.SIGSTOP)
            with pytest.raises(BusError):
                [token async for token in tokens]
        await until(lambda: states["a"].state == "ready" and states["a"].num_restarts == 1)
        await fleet.assert_all_free("a")
        assert "out of reach and keeps" in fleet.log("kv-a")
