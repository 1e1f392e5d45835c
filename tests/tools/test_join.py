"""Joining a fleet from another host: what is asked for, what is refused, and a host that comes and goes."""

import argparse
import asyncio
import json
import os
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from served_fleet import ServedFleet
from waiting import PATIENCE_S

from callboard.actors.actor import start_actor, stop_actor
from callboard.actors.directory import Directory
from callboard.actors.model_config import ModelFacts
from callboard.actors.protocol import Entry, Register
from callboard.bus import Address, Node, Ref
from callboard.bus.keys import KEY_FILE, SECRET_BYTES, FleetKeys, format_secret
from callboard.bus.tasks import Tasks
from callboard.tools.bus_client import visitor
from callboard.tools.endpoints import CONTROL, JoinedEndpoints, address_towards, parse_listen
from callboard.tools.errors import CliError
from callboard.tools.join import load
from callboard.tools.membership import Membership
from callboard.tools.running import RunningFleet, open_fleet

TINY = ModelFacts(4, 8, 64, 2048, 256)
PART = """\
[models.tiny]
path = "model"
[[engine]]
name = "prefill"
[[engine]]
name = "decode"
host = "b"
"""


def arguments(place: Any, text: str, address: str = "tcp://127.0.0.1:7000", **options: Any) -> argparse.Namespace:
    listen = '[listen]\nbus = "tcp://127.0.0.1:7000"\n'
    file = place.write(f'name = "test"\n{listen}{text}')
    return argparse.Namespace(**{"host": "b", "keys": None, "listen": None} | options, address=address, file=str(file))


# ---- the command line and the file -----------------------------------------------------------------------------------


def test_a_host_takes_what_the_fleet_file_has_for_it(place: Any) -> None:
    place.model()
    join = load(arguments(place, PART))
    assert [(engine.name, engine.host) for engine in join.file.fleet.engine] == [("prefill", ""), ("decode", "b")]
    assert (join.fleet.state.name, join.listen, join.port) == ("test", "127.0.0.1", 0)
    named = load(arguments(place, PART, "demo@tcp://localhost:7000", listen="127.0.0.1:7100"))
    assert (named.file.fleet.name, named.fleet.state.directory.endpoint) == ("demo", "tcp://127.0.0.1:7000")
    assert (named.listen, named.port) == ("127.0.0.1", 7100)


def test_a_file_that_names_no_host_is_all_of_the_host_that_joins_with_it(place: Any) -> None:
    place.model()
    fleet = load(arguments(place, PART.replace('host = "b"\n', ""), host="c")).file.fleet
    assert [engine.host for engine in fleet.engine] == ["c", "c"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"host": "c"}, 'has nothing for host "c", but for b: pass --host b'),
        ({"host": "a b"}, '--host "a b" is no name of a host'),
        ({"listen": "0.0.0.0"}, 'nobody can dial "0.0.0.0"'),
        ({"listen": "here"}, '--listen: "here" is no address: write for example 10.0.0.2, or 10.0.0.2:7100'),
        ({"listen": "10.0.0.2"}, "so keys are needed: name the fleet's with --keys DIR"),
        ({"address": "10.0.0.1"}, "is no address of a fleet"),
        ({"keys": "nowhere"}, "there is no key file nowhere/fleet.key: copy the fleet's there"),
    ],
)
def test_what_cannot_be_meant_is_a_sentence(place: Any, options: dict[str, Any], sentence: str) -> None:
    place.model()
    with pytest.raises(CliError) as refused:
        load(arguments(place, PART, **options))
    assert sentence in str(refused.value)
    assert refused.value.exit_code == 2


def test_a_host_needs_a_bus_that_it_can_reach(place: Any) -> None:
    place.model()
    checked = place.callboard("check", str(place.write(PART)))
    assert 'host "b" cannot reach a fleet whose bus is "ipc": write for example bus = ' in checked.stderr


# ---- endpoints -------------------------------------------------------------------------------------------------------


def test_nodes_take_the_ports_from_the_one_that_was_given_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with JoinedEndpoints("tcp://10.0.0.1:7000", "127.0.0.1", port) as endpoints:
        assert endpoints.of(CONTROL) == "tcp://10.0.0.1:7000"
        first = endpoints.of("kv-b-cpu")
        assert (first, endpoints.of("decode")) == (f"tcp://127.0.0.1:{port}", f"tcp://127.0.0.1:{port + 1}")
        assert endpoints.of("kv-b-cpu") == first


def test_a_port_that_is_taken_and_an_address_that_is_not_ours_are_sentences() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with JoinedEndpoints("tcp://10.0.0.1:7000", "127.0.0.1", port) as endpoints:
            with pytest.raises(CliError, match=rf"decode cannot listen at .*:{port} \(address already in use\): pass"):
                endpoints.of("decode")
    with JoinedEndpoints("tcp://10.0.0.1:7000", "192.0.2.77", 0) as endpoints:
        with pytest.raises(CliError, match=r"cannot assign requested address.*pass --listen with an address"):
            endpoints.of("decode")


def test_a_host_listens_where_its_route_to_the_fleet_begins() -> None:
    assert address_towards("127.0.0.1", 7000) == "127.0.0.1"
    assert parse_listen("fd00::2") == ("fd00::2", 0)
    assert parse_listen("[fd00::2]:7100") == ("fd00::2", 7100)


# ---- what the fleet is asked -----------------------------------------------------------------------------------------


@asynccontextmanager
async def control(keys: FleetKeys | None, *, at: str = "tcp://127.0.0.1:*") -> AsyncIterator[tuple[str, Ref]]:
    """A fleet's directory, of which this host has but the address."""
    async with Node(CONTROL, endpoint=at, fleet="test", keys=keys) as node:
        directory = Directory()
        ref = await start_actor(node, "directory", directory)
        yield node.endpoint, ref
        await stop_actor(directory)


def fleet_at(endpoint: str, keys: Path | None, name: str = "test") -> RunningFleet:
    return open_fleet(f"{name}@{endpoint}", keys=None if keys is None else str(keys))


async def why_not(fleet: RunningFleet) -> str:
    async with visitor(fleet) as node:
        with pytest.raises(CliError) as refused:
            await Membership(node, fleet, host="b").entries()
    assert refused.value.exit_code == 2
    return str(refused.value)


async def test_a_fleet_that_does_not_let_us_in_says_why(place: Any) -> None:
    own, others = place.folder / "keys", place.folder / "others"
    for folder in (own, others):
        folder.mkdir(mode=0o700)
        (folder / KEY_FILE).touch(mode=0o600)
        (folder / KEY_FILE).write_text(format_secret(secrets.token_bytes(SECRET_BYTES)))
    async with control(FleetKeys.read(own, "test")) as (at, _):
        async with visitor(fleet_at(at, own)) as node:
            assert await Membership(node, fleet_at(at, own), host="b").entries() == ()
        with socket.create_server(("127.0.0.1", 0)) as free:
            nowhere = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        others_key, others_name, no_key, nobody = await asyncio.gather(
            why_not(fleet_at(at, others)),
            why_not(fleet_at(at, own, "other")),
            why_not(fleet_at(at, None)),
            why_not(fleet_at(nowhere, own)),
        )
    assert f'is not that of a fleet "test" at {at}: both must be right' in others_key
    assert f'is not that of a fleet "other" at {at}' in others_name
    assert "wants its keys: name their directory" in no_key
    assert f"nobody listens at {nowhere}" in nobody


async def test_a_fleet_of_another_version_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async with control(None) as (at, _):
        fleet = fleet_at(at, None)
        async with visitor(fleet) as node:
            monkeypatch.setattr("callboard.bus.links.PROTOCOL_VERSION", 99)
            asking = asyncio.ensure_future(Membership(node, fleet, host="b").entries())
            await asyncio.sleep(0)  # It has said hello, as one of version 99 does.
            monkeypatch.undo()
            with pytest.raises(CliError, match=r"runs another version of Callboard.*install the same one on both"):
                await asking


async def test_names_and_models_that_do_not_fit_are_refused_before_anything_is_started() -> None:
    async with control(None) as (at, directory):
        there = Address("decode", "tcp://10.0.0.3:4000", "decode")
        kv = "4 layers of 8 heads of 64"
        await directory.ask(Register(Entry("decode", "engine", there, model="tiny", detail={"kv": kv}), 60.0))
        await directory.ask(Register(Entry("door", "frontend", there, detail={"models": "tiny, small"}), 60.0))
        manager = Address("kv-b-cpu0", "tcp://10.0.0.4:4000", "kv-b-cpu0")
        await directory.ask(Register(Entry("kv-b-cpu0", "kv_manager", manager, host="b"), 60.0))
        async with visitor(fleet_at(at, None)) as node:
            membership = Membership(node, fleet_at(at, None), host="b", leave_s=0.0)
            with pytest.raises(CliError, match='has a "decode" already, on the host that it was started on: give'):
                await membership.require_free({"decode": "engine"})
            with pytest.raises(CliError, match=r'a host "b" has joined already .*10\.0\.0\.4.* pass --host'):
                await membership.require_free({"kv-b-cpu0": "kv_manager"})
            await membership.require_free({"other": "engine", "kv-b-cpu1": "kv_manager"})

            await membership.require_same({"tiny": TINY})
            with pytest.raises(CliError, match='not serve a model "large": it serves small, tiny'):
                await membership.require_same({"large": TINY})
            with pytest.raises(CliError, match="its KV has 3 layers of 8 heads of 64, that of decode 4 layers of 8"):
                await membership.require_same({"tiny": ModelFacts(3, 8, 64, 2048, 256)})


async def test_who_is_just_leaving_is_waited_for() -> None:
    async with control(None) as (at, directory):
        there = Address("decode", "tcp://10.0.0.3:4000", "decode")
        await directory.ask(Register(Entry("decode", "engine", there), 0.3))
        async with visitor(fleet_at(at, None)) as node:
            await Membership(node, fleet_at(at, None), host="b").require_free({"decode": "engine"})


async def test_a_launcher_says_when_the_fleet_is_lost_and_found_and_when_another_has_its_names() -> None:
    said: list[tuple[str, bool]] = []
    heard = asyncio.Event()

    def say(sentence: str, is_bad: bool) -> None:
        said.append((sentence, is_bad))
        heard.set()

    async def next_said() -> tuple[str, bool]:
        async with asyncio.timeout(PATIENCE_S):
            while not said:
                heard.clear()
                await heard.wait()
        return said.pop(0)

    with socket.create_server(("127.0.0.1", 0)) as free:
        at = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    here, elsewhere = (Address("decode", f"tcp://10.0.0.{n}:4000", "decode") for n in (2, 3))
    async with visitor(fleet_at(at, None)) as node:
        tasks = Tasks(lambda error: say(repr(error), True))
        async with control(None, at=at) as (_, directory):
            membership = Membership(node, fleet_at(at, None), host="b")
            await directory.ask(Register(Entry("decode", "engine", here), 60.0))
            await membership.wait_until_listed({"decode": here.endpoint})
            tasks.spawn(membership.watch({"decode": here.endpoint}, say))
            await directory.ask(Register(Entry("decode", "engine", elsewhere), 60.0))
            rival = f"there is another decode, at {elsewhere.endpoint}: one of the two must leave"
            assert await next_said() == (rival, True)
        sentence, is_bad = await next_said()
        assert ("fleet test was stopped, or its control node has died" in sentence, is_bad) == (True, True)
        async with control(None, at=at):
            sentence, is_bad = await next_said()
            assert ("fleet test is reached again after" in sentence, is_bad) == (True, False)
            await tasks.cancel()


# ---- a host that comes and goes --------------------------------------------------------------------------------------


def test_a_host_joins_serves_dies_and_joins_again(place: Any, eventually: Callable[..., None]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    assert place.callboard("keys", "new").returncode == 0
    fleet = ServedFleet(place, listen=f'bus = "{address}"\nkeys = "keys"', more='host = "b"')  # Of the last engine.
    words = ("join", address, "fleet.toml", "--host", "b", "--detach")
    assert place.callboard(*words).returncode == 0
    eventually(lambda: fleet.complete("hello", max_tokens=4)[0] == 200)

    again = place.callboard(*words)
    assert (again.returncode, "pass --host with another name" in again.stderr) == (2, True), again.stderr
    state = json.loads((place.runtime / "callboard" / "test@b" / "state.json").read_text())
    os.kill(state["launcher_pid"], signal.SIGKILL)
    assert place.callboard(*words).returncode == 0  # What the dead one had in the directory has lapsed meanwhile.
    eventually(lambda: fleet.complete("hello again", max_tokens=4)[0] == 200)
    assert place.callboard("down", "test@b").stdout == "Host b has left fleet test.\n"
    eventually(lambda: sorted(fleet.rows()) == ["frontend", "kv-cpu0", "main", "prefill"])
