"""Clients that do not read, over real sockets before real processes: held back, cut off, and nobody else's harm."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import pytest_asyncio
from real_fleet import RealFleet, real_fleet
from waiting import PATIENCE_S

from callboard.actors.engine.simulated import Simulation
from callboard.actors.frontend import connection
from callboard.actors.node_spec import ActorSpec
from callboard.actors.protocol import GetSubRequests, ListEntries, SubRequest

STALL_S = 1.0
NUM_SLOW = 4
ENDLESS = 30_000
"""Tokens nobody waits for in a test."""
ASKED = {"model": "tiny", "prompt": "the quick", "ignore_eos": True}
SIMULATION = Simulation(vocab_size=320, max_model_len=32_768)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> AsyncIterator[RealFleet]:
    async with real_fleet(tmp_path_factory.mktemp("slow")) as fleet:
        frontend = {
            "router": msgspec.to_builtins(fleet.address("control", "main")),
            "models": {"tiny": {"path": str(model_dir), "max_model_len": SIMULATION.max_model_len}},
            "port": 0,
            "stall_s": STALL_S,
        }
        actor = ActorSpec("frontend", "callboard.actors.frontend.frontend:Frontend", frontend)
        engine = fleet.engine("engine", SIMULATION, num_blocks=8192, max_num_seqs=NUM_SLOW + 1)
        await fleet.start(fleet.directory(), *engine, fleet.router(actor, max_queue=NUM_SLOW + 1))
        yield fleet


async def url_of(fleet: RealFleet) -> str:
    directory = fleet.client.ref(fleet.address("directory", "directory"))
    while True:
        entries = {entry.name: entry for entry in (await directory.ask(ListEntries())).entries}
        if "frontend" in entries and "engine" in entries:
            return str(entries["frontend"].detail["url"])
        await asyncio.sleep(0.02)


def send_request(url: str, request_id: str, **body: Any) -> socket.socket:
    """Ask for a stream and read nothing."""
    host, _, port = url.removeprefix("http://").partition(":")
    data = json.dumps({**ASKED, "stream": True, "stream_options": {"include_usage": True}, **body})
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # So that a test need not fill more.
    client.connect((host, int(port)))
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-request-id: {request_id}\r\ncontent-length: {len(data)}\r\n"
    client.sendall(f"{head}\r\n{data}".encode())
    return client


def read_to_end(client: socket.socket) -> bytes:
    """Return what is there until the connection is cut."""
    client.settimeout(10)
    found = bytearray()
    try:
        while data := client.recv(1 << 16):
            found += data
    except ConnectionResetError:
        pass
    return bytes(found)


async def spans_of(fleet: RealFleet, request_id: str) -> list[SubRequest]:
    router = fleet.client.ref(fleet.address("control", "main"))
    return list((await router.ask(GetSubRequests(request_id))).items)


@pytest.mark.asyncio(loop_scope="module")
async def test_clients_that_do_not_read_are_cut_off_and_slow_nobody(fleet: RealFleet) -> None:
    url, num_served = await url_of(fleet), 0

    def num_cut() -> int:
        return fleet.log("control").count("was cancelled: its client took nothing")

    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=PATIENCE_S))

        async def ask() -> None:
            reply = await http.post("/v1/completions", json={**ASKED, "max_tokens": 50})
            assert reply.status_code == 200, reply.text
            assert reply.json()["usage"]["completion_tokens"] == 50

        slow = [
            stack.enter_context(send_request(url, f"slow-{number}", max_tokens=ENDLESS)) for number in range(NUM_SLOW)
        ]
        # The last place in the queue and in the batch serves on, before and while the others are held back and cut.
        async with asyncio.timeout(PATIENCE_S):
            while num_cut() < NUM_SLOW:
                await ask()
                num_served += 1
        assert num_served > 5
        await fleet.assert_all_free("engine")
        # And every place is free again.
        await asyncio.gather(*(ask() for _ in range(NUM_SLOW + 1)))
        for number, client in enumerate(slow):
            read = await asyncio.to_thread(read_to_end, client)
            assert read.startswith(b"HTTP/1.1 200 OK")
            assert read.count(b"data: ") < ENDLESS / 2
            assert b"[DONE]" not in read
            *before, span = await spans_of(fleet, f"slow-{number}")
            assert span.error == "cancelled"
            # On a busy machine its engine may have been out of reach for a while; it is not asked twice for less.
            assert all(each.error.startswith("LinkLost") for each in before), before


@pytest.mark.asyncio(loop_scope="module")
async def test_a_client_that_reads_slowly_gets_everything(fleet: RealFleet) -> None:
    url, found, num_reads = await url_of(fleet), bytearray(), 0
    with send_request(url, "slow", max_tokens=2000) as client:
        client.setblocking(False)
        while b"[DONE]" not in found[-100:]:
            # For three times stall_s it is held back all the time, and takes a little.
            await asyncio.sleep(STALL_S / 3 if num_reads < 10 else 0.001)
            try:
                data = client.recv(20_000)
            except BlockingIOError:
                continue
            assert data
            found += data
            num_reads += 1
    assert b'"completion_tokens":2000' in found


@pytest.mark.parametrize(
    "sent", [b"", b"POST /v1/completions HT", b"POST /v1/completions HTTP/1.1\r\ncontent-length: 9\r\n\r\n"]
)
async def test_a_request_that_never_comes_to_its_end_is_cut_off(
    door: Any, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "REQUEST_S", 0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", door.frontend.port)
    writer.write(sent)
    async with asyncio.timeout(PATIENCE_S):
        assert await reader.read() == b""
    writer.transport.abort()


async def test_a_kept_connection_may_be_idle(door: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "REQUEST_S", 0.1)
    reader, writer = await asyncio.open_connection("127.0.0.1", door.frontend.port)
    for _ in range(2):
        writer.write(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
        async with asyncio.timeout(PATIENCE_S):
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r")[0]))
        await asyncio.sleep(0.3)  # Longer than a request may take to come.
    writer.transport.abort()
