"""The launcher's door: what it takes, what it refuses, and what of a call is left when one of the two sides goes."""

import asyncio
import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
from waiting import until

from callboard.bus import Address
from callboard.tools.errors import CliError, StartFailed
from callboard.tools.launcher_calls import (
    MOST_BYTES,
    AddEngines,
    Call,
    KeepEngine,
    RestartNode,
    Said,
    call_launcher,
    socket_path,
)
from callboard.tools.launcher_door import Say, launcher_door
from callboard.tools.running import FleetState, RunningFleet


def fleet_in(folder: Path) -> RunningFleet:
    return RunningFleet(folder, FleetState("test", "ready", 0, 0, Address("control", "ipc://x", "directory")))


async def called(folder: Path, call: Call, steps: list[str]) -> Said:
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(None, lambda: call_launcher(fleet_in(folder), call, steps.append))


async def test_a_call_brings_its_steps_and_its_end(place: Any) -> None:
    async def serve(call: Call, say: Say) -> Said:
        say(f"{type(call).__name__} begins")
        if isinstance(call, RestartNode):
            raise StartFailed("it did not start")
        if isinstance(call, KeepEngine):
            raise RuntimeError("a bug")
        return Said("done", names=("x",))

    async with launcher_door(place.folder, serve):
        assert stat.S_IMODE(os.stat(socket_path(place.folder)).st_mode) == 0o600
        steps: list[str] = []
        assert (await called(place.folder, AddEngines("x"), steps)).names == ("x",)
        assert steps == ["AddEngines begins"]
        with pytest.raises(CliError, match="it did not start") as failed:
            await called(place.folder, RestartNode("x"), steps)
        assert failed.value.exit_code == 1
        with pytest.raises(CliError, match="the launcher failed: a bug"):
            await called(place.folder, KeepEngine("x"), steps)
    with pytest.raises(CliError, match="does not answer"):
        await called(place.folder, AddEngines("x"), steps)


@pytest.mark.parametrize(
    "line",
    [
        *(b"", b"\n", b"{}\n", b"nonsense\n", b"\xff\xfe\n", b'["a"]\n', b"x" * (MOST_BYTES + 10)),
        *(b'{"type":"AddEngines"}\n', b'{"type":"Die","name":"x"}\n'),
        b'{"type":"RestartNode","name":"x","more":1}\n',
    ],
)
async def test_what_is_no_call_is_refused_and_the_next_one_served(place: Any, line: bytes) -> None:
    async def serve(call: Call, say: Say) -> Said:
        return Said("done", names=("served",))

    async with launcher_door(place.folder, serve):
        reader, writer = await asyncio.open_unix_connection(str(socket_path(place.folder)))
        writer.write(line)
        writer.write_eof()
        assert b"does not understand" in await reader.read()
        writer.close()
        await writer.wait_closed()
        assert (await called(place.folder, RestartNode("x"), [])).names == ("served",)


async def test_calls_are_served_at_once_and_to_their_end_though_the_caller_leaves(place: Any) -> None:
    begun, ended = [], []
    go_on = asyncio.Event()

    async def serve(call: Call, say: Say) -> Said:
        assert isinstance(call, RestartNode)
        begun.append(call.name)
        say("begins")
        if call.name == "first":
            await go_on.wait()
        ended.append(call.name)
        return Said("done")

    async with launcher_door(place.folder, serve):
        with socket.socket(socket.AF_UNIX) as leaver:
            leaver.connect(str(socket_path(place.folder)))
            leaver.sendall(b'{"type":"RestartNode","name":"first"}\n')
            await until(lambda: begun == ["first"])
            await called(place.folder, RestartNode("second"), [])
            assert ended == ["second"]
        go_on.set()
        await until(lambda: ended == ["second", "first"])


async def test_a_launcher_that_stops_ends_what_it_serves(place: Any) -> None:
    async def serve(call: Call, say: Say) -> Said:
        say("begins")
        return await asyncio.get_running_loop().create_future()

    steps: list[str] = []
    async with launcher_door(place.folder, serve):
        call = asyncio.ensure_future(called(place.folder, RestartNode("x"), steps))
        await until(lambda: steps == ["begins"])
    with pytest.raises(CliError, match="ended before it was done"):
        await call
