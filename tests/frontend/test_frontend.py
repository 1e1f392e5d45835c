"""The frontend as an actor: health, failures of the fleet, clients that leave or dawdle, its start and its end."""

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import pytest
from waiting import PATIENCE_S

from callboard.actors.actor import stop_actor
from callboard.actors.directory import Directory
from callboard.actors.frontend.frontend import ServedModel
from callboard.actors.frontend.listener import PortTaken
from callboard.actors.protocol import BadRequest, Entry, Register
from callboard.bus import ActorDied, AskTimeout, LinkLost, Refusal
from callboard.kv.layout import OutOfBlocks


class Odd(Refusal):
    sentence = "odd"


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (BadRequest(reason="no engine can do this"), 400, "no engine can do this"),
        (OutOfBlocks(needed=8, free=3), 503, "8 blocks are needed"),
        (ActorDied("decode crashed"), 503, "decode crashed"),
        (LinkLost("decode is cut off"), 503, "cut off"),
        (AskTimeout("decode did not answer"), 504, "did not answer"),
        (Odd(), 500, "odd"),
    ],
)
@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_failure_before_the_first_token_is_a_status(
    door: Any, error: Exception, status: int, says: str, is_streamed: bool
) -> None:
    door.router.says(error)
    reply = await door.complete(stream=is_streamed)
    assert reply.status_code == status
    assert says in reply.json()["error"]["message"]
    assert ("retry-after" in reply.headers) == (status == 503)
    door.router.says("fine")
    assert (await door.complete()).json()["choices"][0]["text"] == "fine"


async def test_one_failed_choice_cancels_the_others(door: Any) -> None:
    door.router.plan = lambda message: [0.05, Odd()] if message.sampling.index == 1 else ["x", 30.0]
    reply = await door.complete(n=2)
    assert reply.status_code == 500
    await door.router.all_ended.wait()
    assert sorted(door.router.ended.values()) == ["cancelled", "failed"]


async def test_a_request_that_takes_too_long_is_cancelled(open_door: Any) -> None:
    door = await open_door(request_timeout_s=0.1)
    door.router.says(30.0)
    reply = await door.complete()
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
    await door.router.all_ended.wait()


async def raw_request(door: Any, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", door.frontend.port, limit=1 << 14)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()
    return reader, writer


@pytest.mark.parametrize("is_streamed", ["true", "false"])
@pytest.mark.parametrize("first", [[], ["Hello"]])
async def test_a_client_that_leaves_cancels_everything(door: Any, is_streamed: str, first: list[str]) -> None:
    door.router.says(*first, 30.0)
    body = f'{{"model": "tiny", "prompt": "x", "n": 2, "max_tokens": 50, "stream": {is_streamed}}}'
    _, writer = await raw_request(door, body.encode())
    async with asyncio.timeout(PATIENCE_S):
        await door.router.until(lambda: len(door.router.asked) == 2 and door.router.num_sent >= 2 * len(first))
        writer.transport.abort()
        await door.router.all_ended.wait()
    assert list(door.router.ended.values()) == ["cancelled", "cancelled"]
    assert (await door.http.get("/v1/models")).status_code == 200


async def test_a_client_that_does_not_read_holds_the_router_back(door: Any) -> None:
    door.frontend._models["tiny"] = type(door.frontend._models["tiny"])("tiny", door.router.tokenizer, 10_000_000, 0)
    door.router.plan = lambda message: [70] * 200_000
    reader, writer = await raw_request(door, b'{"model":"tiny","prompt":"x","max_tokens":5000000,"stream":true}')
    async with asyncio.timeout(PATIENCE_S):
        await door.router.until(lambda: door.router.num_sent > 300)
        await door.router.until_quiet()
        num_sent = door.router.num_sent
        assert num_sent < 100_000
        for _ in range(200):
            await reader.read(1 << 14)
        await door.router.until(lambda: door.router.num_sent > num_sent)
        writer.transport.abort()
        await door.router.all_ended.wait()


async def test_tokens_that_are_ready_together_are_written_together(door: Any) -> None:
    door.router.says("one two three", 0.05, "one two three four")
    async with door.http.stream(
        "POST", "/v1/completions", json={"model": "tiny", "prompt": "x", "stream": True, "max_tokens": 60}
    ) as reply:
        writes = [part async for part in reply.aiter_raw()]
    assert 2 <= len(writes) <= 6
    assert max(part.count(b"data: ") for part in writes) > 3


async def test_the_request_id_is_the_clients_and_stays_unique(door: Any) -> None:
    door.router.says("x", 0.1)
    headers = {"x-request-id": "mine", "x-tenant": "a", "x-api-key": "hidden"}
    body = {"model": "tiny", "prompt": "x"}
    first, second = await asyncio.gather(
        *(door.http.post("/v1/completions", json=body, headers=headers) for _ in range(2))
    )
    assert sorted(reply.headers["x-request-id"] for reply in (first, second)) == ["mine", "mine-2"]
    assert sorted(message.request_id for message in door.router.asked) == ["mine", "mine-2"]
    assert door.router.asked[0].headers == {"x-tenant": "a"}
    third = await door.http.post("/v1/completions", json=body, headers={"x-request-id": "not this!"})
    assert third.headers["x-request-id"] == third.json()["id"]
    again = await door.http.post("/v1/completions", json=body, headers=headers)
    assert again.headers["x-request-id"] == "mine"


async def test_health_wants_an_engine_for_every_role(open_door: Any, model_dir: Path) -> None:
    served = ServedModel(str(model_dir), 128, ("decode", "prefill"))
    door = await open_door(directory=Directory(), models={"tiny": served})
    directory, statuses = door.frontend.directory, []
    for role in ("prefill", "decode"):
        engine = Entry(name=role, kind="engine", address=directory.address, model="tiny", roles=(role,))
        await directory.ask(Register(engine, 60.0))
        async with asyncio.timeout(PATIENCE_S):
            await door.frontend._view.wait_for(lambda view, role=role: any(e.name == role for e in view.entries))
        statuses.append((await door.http.get("/health")).status_code)
    assert statuses == [503, 200]


async def test_health_says_which_model_has_no_engine(open_door: Any) -> None:
    door = await open_door(directory=Directory())
    directory = door.frontend.directory
    engine = Entry(name="decode", kind="engine", address=directory.address, model="tiny", state="loading")
    assert (await door.http.get("/health")).json() == {"status": "unavailable", "missing": ["tiny"]}
    await directory.ask(Register(engine, 60.0))
    assert (await door.http.get("/health")).status_code == 503
    ready = Entry(name="decode", kind="engine", address=directory.address, model="tiny")
    await directory.ask(Register(ready, 60.0))
    async with asyncio.timeout(PATIENCE_S):
        await door.frontend._view.wait_for(lambda view: any(e.state == "ready" and e.model for e in view.entries))
        assert (await door.http.get("/health")).json() == {"status": "ok", "missing": []}
        view = await door.frontend._view.wait_for(lambda view: any(e.kind == "frontend" for e in view.entries))
    [entry] = [entry for entry in view.entries if entry.kind == "frontend"]
    assert entry.detail == {"url": door.frontend.url, "models": "tiny"}


async def test_a_taken_port_fails_at_once_with_its_number(open_door: Any, door: Any) -> None:
    from callboard.actors.frontend.listener import bind

    with pytest.raises(PortTaken, match=str(door.frontend.port)):
        bind("127.0.0.1", door.frontend.port)
    bind("127.0.0.1", 0).close()


async def test_stopping_ends_the_requests_with_an_error_and_frees_the_port(door: Any) -> None:
    door.router.says("x", 30.0)
    streamed, whole = asyncio.ensure_future(door.complete(stream=True)), asyncio.ensure_future(door.complete())
    async with asyncio.timeout(PATIENCE_S):
        await door.router.until(lambda: door.router.num_sent == 2)
        await stop_actor(door.frontend)
        await door.router.all_ended.wait()
        assert '"code":"shutting_down"' in (await streamed).text
        assert (await whole).status_code == 503
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", door.frontend.port))


async def test_stopping_lets_requests_end(door: Any) -> None:
    door.router.says("Hello", 0.2, " world")
    request = asyncio.ensure_future(door.complete())
    async with asyncio.timeout(PATIENCE_S):
        await door.router.until(lambda: door.router.num_sent == 1)
        await stop_actor(door.frontend)
    assert (await request).json()["choices"][0]["text"] == "Hello world"


async def test_a_kept_connection_serves_many_requests(door: Any) -> None:
    for _ in range(20):
        assert (await door.complete()).status_code == 200
        assert (await door.complete(stream=True)).text.endswith("data: [DONE]\n\n")
    assert set(door.router.ended.values()) == {"done"}


async def test_no_event_is_cut_by_clients_that_know_more_ends_of_lines(door: Any) -> None:
    text = "one\u2028two\u2029three\x85four é"
    door.router.says(text)
    body = {"model": "tiny", "prompt": "x", "stream": True, "max_tokens": 60}
    async with door.http.stream("POST", "/v1/completions", json=body) as reply:
        lines = [line async for line in reply.aiter_lines() if line]
    assert all(line.startswith("data: ") for line in lines), lines
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]
    assert "".join(choice["text"] for event in events for choice in event["choices"]) == text
