"""bench/router.py: its client, its mock workers, and the whole of it, short."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from callboard.tools.machine import claim_port

BENCH = Path(__file__).parent.parent.parent / "bench"


@pytest.fixture(autouse=True)
def bench_on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(BENCH)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in ("_router", "_strategies")]:
        del sys.modules[name]


class Transport:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def close(self) -> None:
        pass


def answered_in_chunks(num_events: int) -> bytes:
    from _router.events import DONE, event

    events = [*(num_events * [event("free", None)]), DONE]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(each), each) for each in events)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


@pytest.mark.parametrize("size", [1, 5, 7, 64, 10_000])
async def test_events_are_counted_however_the_answer_is_cut(size: int) -> None:
    from _router.client import Connection

    connection, transport = Connection(), Transport()
    connection.connection_made(transport)  # type: ignore[arg-type]
    for num_events in (3, 1):  # The connection is kept.
        asking = asyncio.ensure_future(connection.ask(b"head", b"body"))
        await asyncio.sleep(0)
        answer = answered_in_chunks(num_events)
        for begin in range(0, len(answer), size):
            assert not asking.done()
            connection.data_received(answer[begin : begin + size])
        assert (await asking).num_events == num_events
    assert transport.written == 2 * [b"head", b"body"]


async def test_an_answer_that_is_no_success_is_an_error() -> None:
    from _router.client import Connection

    connection = Connection()
    connection.connection_made(Transport())  # type: ignore[arg-type]
    asking = asyncio.ensure_future(connection.ask(b"x"))
    await asyncio.sleep(0)
    connection.data_received(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\nno")
    with pytest.raises(RuntimeError, match="503"):
        await asking


async def test_mock_workers_send_an_event_for_each_token() -> None:
    from _router import client
    from _router.sides import process_of, until_served

    port = claim_port("127.0.0.1", 0)
    async with process_of("_router.worker", str(port), "raw"):
        await until_served(port)
        load = await client.streams(port, "free", 8, 20)
        assert load.num_events == 160
        assert len(await client.one_by_one(port, 3)) == 3


def test_frontend_and_router_are_measured(tmp_path: Path) -> None:
    path = tmp_path / "router.json"
    options = ("--rounds", "1", "--seconds", "0.1", "--frontends", "1", "--json", path)
    done = subprocess.run([sys.executable, BENCH / "router.py", *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(path.read_text())
    (ours,) = (row for row in result["rows"] if row["side"] == "Callboard")
    # Nothing of processor time is held: ticks of 10 ms are too coarse for so short a run.
    assert all(ours[name] > 0 for name in ("requests/s", "events/s", "TTFT ms", "TTFT P99 ms"))
    assert {"TTFT added to the engine's, ms"} <= {goal["name"] for goal in result["goals"]}
    if len(result["rows"]) == 1:
        assert "vllm-router is left out" in done.stderr
