"""Several frontends at one port: who answers, what a scrape tells, ids that clients choose, and leaving."""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from served_fleet import Scraped, requests_by_frontend, samples_of
from waiting import PATIENCE_S, until

from callboard.actors.actor import stop_actor
from callboard.actors.frontend import draining
from callboard.actors.frontend.listener import UNSENT_BYTES
from callboard.actors.frontend_protocol import CannotDrain, Drained, DrainFrontend, GetFrontendMetrics
from callboard.bus import AskTimeout, BusError

OpenDoors = Callable[..., Awaitable[list[Any]]]
SMALL, LARGE = 4 << 10, 1 << 20
"""Bytes that a client's side takes of an answer that is not read, and more than both sides' kernel takes."""


def labels_of(scraped: Scraped) -> set[Any]:
    return set(scraped)


async def scrape(door: Any) -> Scraped:
    answer = await door.http.get("/metrics")
    assert answer.status_code == 200
    return samples_of(answer.text)


def num_open(door: Any) -> int:
    """How many connections a frontend has."""
    number: int = door.frontend._server._server.acceptor.num_open
    return number


async def on_each(doors: list[Any]) -> list[int]:
    """Have each door's client connect; return the connections of each frontend."""
    for door in doors:
        assert (await door.http.get("/health/live")).status_code == 200
    return [num_open(door) for door in doors]


async def test_clients_are_spread_over_the_frontends_and_each_answers(open_doors: OpenDoors) -> None:
    doors = await open_doors(3)
    assert await on_each(doors) == [1, 1, 1]
    assert len({door.frontend.url for door in doors}) == 1
    for door in doors:
        assert (await door.complete()).status_code == 200
        assert (await door.complete(stream=True)).text.endswith("data: [DONE]\n\n")
    await doors[1].http.aclose()
    await until(lambda: sum(map(num_open, doors)) == 2)


async def test_whichever_is_scraped_tells_of_all(open_doors: OpenDoors) -> None:
    doors = await open_doors(2)
    assert await on_each(doors) == [1, 1]
    for door, count in zip(doors, (3, 2), strict=True):
        for _ in range(count):
            assert (await door.complete()).status_code == 200
    found: list[Scraped] = []

    async def both() -> bool:
        found[:] = [await scrape(door) for door in doors]
        return all(sum(requests_by_frontend(each).values()) == 5 for each in found)

    async with asyncio.timeout(PATIENCE_S):
        while not await both():  # What a client has read may not be counted yet.
            await asyncio.sleep(0.01)
    one, other = found
    assert sorted(requests_by_frontend(one).values()) == [2, 3]
    assert labels_of(one) == labels_of(other)
    still = {key for key in one if not key[0].startswith("process_")}
    assert {key: one[key] for key in still} == {key: other[key] for key in still}
    frontends = {dict(labels).get("frontend") for (name, labels) in one if name == "process_cpu_seconds_total"}
    assert frontends == {"frontend-0", "frontend-1"}


async def test_of_one_that_has_gone_the_series_are_missing_and_no_number_shrinks(open_doors: OpenDoors) -> None:
    doors = await open_doors(2)
    assert await on_each(doors) == [1, 1]
    for door in doors:
        assert (await door.complete()).status_code == 200
    async with asyncio.timeout(PATIENCE_S):
        while sum(requests_by_frontend(before := await scrape(doors[0])).values()) < 2:
            await asyncio.sleep(0.01)
    await stop_actor(doors[1].frontend)
    async with asyncio.timeout(PATIENCE_S):
        while len(requests_by_frontend(after := await scrape(doors[0]))) == 2:
            await asyncio.sleep(0.01)
    gone = {dict(labels).get("frontend") for _, labels in labels_of(before) - labels_of(after)}
    assert len(gone - {None}) == 1
    counters = [key for key in after if key in before and key[0].endswith(("_total", "_count", "_sum", "_bucket"))]
    assert counters
    assert all(after[key] >= before[key] for key in counters)


async def test_one_that_does_not_know_the_others_tells_of_itself(open_doors: OpenDoors) -> None:
    [door] = await open_doors(1)
    answer = await door.router.node.ref(door.frontend.ref.address).ask(GetFrontendMetrics())
    assert {family.name for family in answer.families} >= {"callboard_requests", "callboard_bus_links"}
    assert (await scrape(door))["callboard_directory_up", frozenset({("frontend", "frontend-0")})] == 1.0


async def test_an_id_that_two_clients_chose_is_in_flight_once(open_doors: OpenDoors) -> None:
    doors = await open_doors(2)
    assert await on_each(doors) == [1, 1]
    router = doors[0].router
    router.says("x", 0.3, "y")
    body = {"model": "tiny", "prompt": "a", "n": 2}
    same = {"x-request-id": "same"}
    answers = await asyncio.gather(*(d.http.post("/v1/completions", json=body, headers=same) for d in doors))
    assert {answer.headers["x-request-id"] for answer in answers} == {"same", "same-2"}
    assert {asked.request_id for asked in router.asked} == {"same", "same.1", "same-2", "same-2.1"}
    again = await doors[1].http.post("/v1/completions", json=body, headers=same)
    assert again.headers["x-request-id"] == "same", "it was given back"


@pytest.fixture
def client() -> Iterator[socket.socket]:
    """A client that takes next to nothing as long as it does not read."""
    with socket.socket() as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
        made.setblocking(False)
        yield made


def door_with_request(doors: list[Any]) -> Any:
    [busy] = [door for door in doors if door.frontend._server.num_requests]
    return busy


async def test_one_that_is_drained_answers_what_it_has_and_takes_nothing_new(open_doors: OpenDoors) -> None:
    doors = await open_doors(2)
    assert await on_each(doors) == [1, 1]
    router = doors[0].router
    router.says("x", 0.7, "y")
    streamed = asyncio.ensure_future(doors[0].complete(stream=True))
    await until(lambda: router.num_sent)
    busy = door_with_request(doors)
    idle = next(door for door in doors if door is not busy)
    bus = router.node.ref(busy.frontend.ref.address)
    drained = asyncio.ensure_future(bus.ask(DrainFrontend(), timeout=PATIENCE_S))
    await until(lambda: busy.frontend._server._config.is_leaving)
    with pytest.raises(CannotDrain, match="already"):
        await bus.ask(DrainFrontend())
    await idle.frontend._view.wait_for(lambda view: any(entry.state == "draining" for entry in view.entries))
    with pytest.raises(CannotDrain, match="no other one"):
        await router.node.ref(idle.frontend.ref.address).ask(DrainFrontend())
    router.says("z")
    answers = []
    for _ in range(5):
        answers.append(await doors[1].http.get("/v1/models", headers={"connection": "close"}))
    assert {answer.status_code for answer in answers} == {200}
    assert num_open(busy) == 1
    assert not drained.done()
    assert (await streamed).text.endswith("data: [DONE]\n\n")
    kept = await doors[0].complete()
    assert kept.headers["connection"] == "close", "who stays is served, and told to leave"
    found = await drained
    assert isinstance(found, Drained)
    assert found.num_requests == 1
    assert num_open(busy) == 0


async def test_who_has_one_drained_and_leaves_has_undone_it(open_doors: OpenDoors) -> None:
    doors = await open_doors(2)
    assert await on_each(doors) == [1, 1]
    router = doors[0].router
    router.says("x", 30.0)
    streamed = asyncio.ensure_future(doors[0].complete(stream=True))
    await until(lambda: router.num_sent)
    busy = door_with_request(doors)
    with pytest.raises(AskTimeout):
        await router.node.ref(busy.frontend.ref.address).ask(DrainFrontend(), timeout=0.2)
    await until(lambda: not busy.frontend._server._config.is_leaving)
    async with asyncio.timeout(PATIENCE_S):
        await doors[0].frontend._view.wait_for(
            lambda view: [entry.state for entry in view.entries if entry.kind == "frontend"] == ["ready", "ready"]
        )
    clients = [await asyncio.open_connection("127.0.0.1", busy.frontend.port) for _ in range(4)]
    await until(lambda: num_open(busy) == 3)
    for _, writer in clients:
        writer.close()
    streamed.cancel()


async def test_the_only_one_is_not_drained(open_doors: OpenDoors, door: Any) -> None:
    [alone] = await open_doors(1)
    with pytest.raises(CannotDrain, match="no other one would accept connections"):
        await alone.router.node.ref(alone.frontend.ref.address).ask(DrainFrontend())
    with pytest.raises(CannotDrain, match="it is the only one"):
        await door.router.node.ref(door.frontend.ref.address).ask(DrainFrontend())


async def test_connections_are_as_they_would_be_without_others(open_doors: OpenDoors) -> None:
    [door] = await open_doors(1)
    assert await on_each([door]) == [1]
    [connection] = door.frontend._server._server.server_state.connections
    found = connection.transport.get_extra_info("socket")
    assert found.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert found.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == UNSENT_BYTES
    num_files = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        _, writer = await asyncio.open_connection("127.0.0.1", door.frontend.port)
        await until(lambda: num_open(door) == 2)
        writer.close()
        await until(lambda: num_open(door) == 1)
    assert len(os.listdir("/proc/self/fd")) <= num_files + 2


async def test_who_was_drained_has_no_connection_left_on_which_a_request_could_come(
    open_doors: OpenDoors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draining, "LINGER_S", 0.1)
    doors = await open_doors(2)
    assert await on_each(doors) == [1, 1]
    drained = doors[0].frontend
    assert await doors[0].router.node.ref(drained.ref.address).ask(DrainFrontend()) == Drained(0, draining.RESUME_S)
    await until(lambda: num_open(doors[0]) == 0)
    assert (await doors[0].complete()).status_code == (await doors[1].complete()).status_code == 200
    assert num_open(doors[0]) == 0, "they have connected to the other"


async def test_a_drain_waits_for_who_has_not_taken_the_end_of_an_answer(
    open_doors: OpenDoors, client: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draining, "LINGER_S", 0.1)
    doors = await open_doors(2)
    assert await on_each(doors) == [1, 1]
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, ("127.0.0.1", doors[0].frontend.port))
    body = b'{"model": "%b", "prompt": "a"}' % (b"x" * LARGE)  # It is told that there is no such model.
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
    await loop.sock_sendall(client, head % len(body) + body)
    servers = {door.frontend: door.frontend._server._server.server_state for door in doors}

    def has_slow(state: Any) -> bool:
        return any(each.transport.get_write_buffer_size() for each in state.connections) and not state.tasks

    await until(lambda: any(map(has_slow, servers.values())))
    [slow] = [frontend for frontend, state in servers.items() if has_slow(state)]
    bus = doors[0].router.node.ref(slow.ref.address)
    with pytest.raises(AskTimeout):
        await bus.ask(DrainFrontend(), timeout=0.5)
    drained = asyncio.ensure_future(bus.ask(DrainFrontend(), timeout=PATIENCE_S))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, LARGE)
    text = b""
    while piece := await loop.sock_recv(client, LARGE):
        text += piece
    assert text.count(b"x") > LARGE
    assert (await drained).num_requests == 0


async def test_of_two_that_are_drained_at_the_same_time_one_accepts(open_doors: OpenDoors) -> None:
    doors = await open_doors(2)
    assert await on_each(doors) == [1, 1]
    router = doors[0].router
    asked = (router.node.ref(door.frontend.ref.address).ask(DrainFrontend(), timeout=PATIENCE_S) for door in doors)
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert any(isinstance(answer, CannotDrain) for answer in answers)


async def test_one_whose_last_other_dies_while_it_is_drained_accepts_again(open_doors: OpenDoors) -> None:
    doors = await open_doors(2)
    assert await on_each(doors) == [1, 1]
    router = doors[0].router
    router.says("x", 30.0)
    streamed = asyncio.ensure_future(doors[0].complete(stream=True))
    await until(lambda: router.num_sent)
    busy = door_with_request(doors)
    drained = asyncio.ensure_future(router.node.ref(busy.frontend.ref.address).ask(DrainFrontend(), timeout=PATIENCE_S))
    await until(lambda: busy.frontend._server._config.is_leaving)
    await stop_actor(next(door for door in doors if door is not busy).frontend)
    with pytest.raises(CannotDrain, match="no other one"):
        await drained
    _, writer = await asyncio.open_connection("127.0.0.1", busy.frontend.port)
    await until(lambda: num_open(busy) == 2)
    writer.close()
    streamed.cancel()


async def test_once_all_are_ending_the_port_refuses_connections(open_doors: OpenDoors) -> None:
    doors = await open_doors(2, grace_s=60)
    assert await on_each(doors) == [1, 1]
    router, port = doors[0].router, doors[0].frontend.port
    router.says("x", 60.0)
    streamed = asyncio.ensure_future(doors[0].complete(stream=True))
    await until(lambda: router.num_sent)
    ending = [asyncio.ensure_future(stop_actor(door.frontend)) for door in doors]

    async def is_refused() -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except ConnectionRefusedError:
            return True
        writer.close()
        return False

    async with asyncio.timeout(PATIENCE_S):
        while not await is_refused():
            await asyncio.sleep(0.01)
    assert not streamed.done(), "what it has goes on"
    streamed.cancel()
    await asyncio.gather(*ending)


async def test_one_that_was_drained_and_not_ended_accepts_again(
    open_doors: OpenDoors, monkeypatch: pytest.MonkeyPatch
) -> None:
    doors = await open_doors(2)
    assert await on_each(doors) == [1, 1]
    monkeypatch.setattr(draining, "LINGER_S", 0.1)
    monkeypatch.setattr(draining, "RESUME_S", 0.2)
    bus = doors[0].router.node.ref(doors[0].frontend.ref.address)
    for _ in range(2):
        assert await bus.ask(DrainFrontend()) == Drained(0, 0.2)
        assert doors[0].frontend._server._config.is_leaving
        await until(lambda: not doors[0].frontend._server._config.is_leaving)
    entry = await doors[1].frontend._view.wait_for(lambda view: all(e.state == "ready" for e in view.entries))
    assert [e.name for e in entry.entries if e.kind == "frontend"] == ["frontend-0", "frontend-1"]


async def test_one_that_is_stopped_while_it_is_drained_ends(open_doors: OpenDoors) -> None:
    doors = await open_doors(2)
    assert await on_each(doors) == [1, 1]
    bus = doors[0].router.node.ref(doors[0].frontend.ref.address)
    drained = asyncio.ensure_future(bus.ask(DrainFrontend(), timeout=PATIENCE_S))
    await until(lambda: doors[0].frontend._server._config.is_leaving)
    async with asyncio.timeout(PATIENCE_S):
        await stop_actor(doors[0].frontend)
    with pytest.raises(BusError):
        await drained
    clients = [await asyncio.open_connection("127.0.0.1", doors[1].frontend.port) for _ in range(3)]
    await until(lambda: num_open(doors[1]) >= 4)
    for _, writer in clients:
        writer.close()


async def test_openmetrics_of_several_is_what_its_parser_takes(open_doors: OpenDoors) -> None:
    doors = await open_doors(2)
    assert await on_each(doors) == [1, 1]
    for door in doors:
        assert (await door.complete()).status_code == 200
    answer = await doors[0].http.get("/metrics", headers={"accept": "application/openmetrics-text;version=1.0.0"})
    families = {family.name: family for family in parse_openmetrics(answer.text)}
    buckets = families["callboard_time_to_first_token_seconds"].samples
    assert {sample.labels["frontend"] for sample in buckets} == {"frontend-0", "frontend-1"}
