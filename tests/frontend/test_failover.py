"""Several routers behind one frontend: spread over, and gone on with another when one is lost; no token lost or twice.

What is lost here is a node, an actor or a link; real processes are killed in tests/survival.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from waiting import PATIENCE_S, until

from callboard.actors.protocol import ATTEMPTS_EACH, Generate, Token
from callboard.bus import ActorDied, LinkLost
from callboard.kv.tokens import num_tokens, unpack_tokens
from callboard.router.errors import QueueFull

ANSWER = "schöne Grüße 🙂 and hello there"
FULL = QueueFull(num_in_flight=1, max_queue=1)


async def stop(door: Any, router: Any) -> None:
    await router.node.stop()


async def crash(door: Any, router: Any) -> None:
    router.node.crash(router.name, RuntimeError("a bug"))


async def cut(door: Any, router: Any) -> None:
    """Break the link between frontend and router; both live."""
    transport = door.frontend.node.transport
    for near in list(transport.connections):
        if near.other is not None and near.other.transport is router.node.transport:
            near.close()
            transport.listener.closed(near, "it was cut")


LOSSES = (stop, crash, cut)
Lose = Callable[[Any, Any], Awaitable[None]]


@pytest.fixture
async def two(open_door: Any) -> Any:
    return await open_door(num_routers=2, patience_s=PATIENCE_S)


def asked_of(door: Any) -> tuple[Any, Any]:
    """Return the router that was asked first, and the other."""
    first, second = door.routers
    return (first, second) if first.asked else (second, first)


async def until_asked(door: Any, num_sent: int = 0) -> tuple[Any, Any]:
    await until(lambda: any(router.asked and router.num_sent >= num_sent for router in door.routers))
    return asked_of(door)


async def until_read(door: Any, num_sent: int) -> None:
    """Wait until the frontend has read what was sent, of all sequences."""
    answers = door.frontend._backend.outboxes
    await until(lambda: answers and sum(router.num_sent for router in door.routers) >= num_sent)
    await asyncio.sleep(0.02)


async def text_of(reply: Any) -> str:
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["text"])


async def test_requests_are_spread_by_what_is_in_flight_and_then_in_turn(two: Any) -> None:
    for router in two.routers:
        router.says("x", 0.3)
    replies = await asyncio.gather(*(two.complete(n=2) for _ in range(4)))
    assert [reply.status_code for reply in replies] == [200] * 4
    assert [len(router.asked) for router in two.routers] == [4, 4]
    for router in two.routers:
        router.says("x")
    for _ in range(4):
        await two.complete()
    assert [len(router.asked) for router in two.routers] == [6, 6]
    assert {message.attempt for router in two.routers for message in router.asked} == {0}


@pytest.mark.parametrize("lose", LOSSES)
@pytest.mark.parametrize("is_streamed", [False, True])
async def test_before_the_first_token_another_router_is_asked(two: Any, lose: Lose, is_streamed: bool) -> None:
    for router in two.routers:
        router.says(30.0)
    request = asyncio.ensure_future(two.complete(stream=is_streamed))
    lost, other = await until_asked(two)
    other.says("Hello world")
    await lose(two, lost)
    reply = await request
    assert reply.status_code == 200
    assert ("Hello" in reply.text) if is_streamed else (await text_of(reply) == "Hello world")
    [asked], [again] = lost.asked, other.asked
    assert (again.request_id, again.prompt, again.num_output_tokens) == (asked.request_id, asked.prompt, 0)
    assert (asked.attempt, again.attempt) == (0, ATTEMPTS_EACH)


@pytest.mark.parametrize("lose", LOSSES)
@pytest.mark.parametrize("where", ["first", "half", "last"])
async def test_what_was_sent_stays_and_the_rest_comes_from_another(two: Any, lose: Lose, where: str) -> None:
    ids = two.router.tokenizer.encode(ANSWER, add_special_tokens=False)
    decode = two.router.tokenizer.decode
    half = next(num for num in range(1, len(ids)) if decode(ids[:num]).endswith("\N{REPLACEMENT CHARACTER}"))
    num_sent = {"first": 1, "half": half, "last": len(ids)}[where]
    for router in two.routers:
        router.says(*ids[:num_sent], 30.0, *ids[num_sent:])
    body = {"max_tokens": 100, "logprobs": 1, "return_token_ids": True}
    request = asyncio.ensure_future(two.complete(**body))
    lost, other = await until_asked(two, num_sent)
    await until_read(two, num_sent)
    other.says(*ids)
    await lose(two, lost)
    reply = (await request).json()
    [choice] = reply["choices"]
    assert (choice["text"], choice["finish_reason"]) == (ANSWER, "stop")
    assert choice["token_ids"][:-1] == ids
    assert len(choice["logprobs"]["tokens"]) == len(ids)
    assert choice["logprobs"]["token_logprobs"] == [-0.5] * len(ids)
    assert reply["usage"]["completion_tokens"] == len(ids) + 1
    [asked], [again] = lost.asked, other.asked
    assert again.num_output_tokens == num_sent
    assert unpack_tokens(again.prompt) == unpack_tokens(asked.prompt) + ids[:num_sent]
    assert again.sampling == asked.sampling
    await until(lambda: set(lost.ended.values()) <= {"link_lost", "stopped", "cancelled", "failed"} and lost.ended)


async def test_all_choices_go_on_and_a_stop_string_may_begin_at_one_router_and_end_at_another(two: Any) -> None:
    def ids_of(message: Generate) -> list[int]:
        return list(two.router.tokenizer.encode(f"{message.sampling.index} one two three", add_special_tokens=False))

    def plan(message: Generate) -> list[Any]:
        return [*ids_of(message)[:-1], 30.0]

    for router in two.routers:
        router.plan = plan
    body = {"model": "tiny", "prompt": "x", "n": 4, "stream": True, "stop": [" three"], "max_tokens": 60}
    async with two.http.stream("POST", "/v1/completions", json=body) as reply:
        lines = reply.aiter_lines()
        await until(lambda: sum(len(router.asked) for router in two.routers) == 4)
        lost, other = two.routers
        await until_read(two, sum(len(ids_of(message)) - 1 for router in two.routers for message in router.asked))
        assert len(other.asked) == 2
        for router in two.routers:
            router.plan = lambda message: [*ids_of(message), " four", 30.0]
        await stop(two, lost)
        await until(lambda: len(other.asked) == 4)
        await cut(two, other)  # There is no other than this one now, and it is asked again.
        text = "\n".join([line async for line in lines])
    texts = [""] * 4
    for event in text.split("data: ")[1:-1]:
        [choice] = json.loads(event)["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == [f"{index} one two" for index in range(4)]
    assert text.strip().endswith("[DONE]")


async def test_tokens_that_come_twice_are_left_out_and_a_gap_is_a_loss(two: Any) -> None:
    ids = two.router.tokenizer.encode("one two three", add_special_tokens=False)
    careful = two.router._tokens.__func__
    for router in two.routers:

        async def tokens(message: Generate, router: Any = router) -> AsyncIterator[Token]:
            if message.attempt:
                async for token in careful(router, message):
                    yield token
            else:
                for position, id in ((0, ids[0]), (0, ids[0]), (1, ids[1]), (0, ids[0]), (3, ids[3])):
                    yield Token(position, id)

        router._tokens = tokens
        router.says(*ids)
    reply = await two.complete(max_tokens=len(ids), return_token_ids=True)
    assert reply.json()["choices"][0]["token_ids"] == ids
    [first], [second] = (router.asked for router in two.routers)
    assert {first.num_output_tokens, second.num_output_tokens} == {0, 2}


@pytest.mark.parametrize("error", [ActorDied("engine decode is gone"), LinkLost("engine decode is cut off")])
async def test_a_death_behind_a_router_is_the_routers_to_deal_with(two: Any, error: Exception) -> None:
    for router in two.routers:
        router.says(error)
    reply = await two.complete()
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "unavailable")
    assert "retry-after" in reply.headers
    assert sum(len(router.asked) for router in two.routers) == 1


async def test_a_request_that_kills_its_routers_is_given_up(open_door: Any) -> None:
    door = await open_door(num_routers=5, patience_s=PATIENCE_S)
    for router in door.routers:
        router.says(RuntimeError("this very request"))
    reply = await door.complete()
    assert reply.status_code == 503
    assert sum(len(router.asked) for router in door.routers) == 3
    assert (await door.http.get("/v1/models")).status_code == 200


async def test_a_full_router_is_passed_over_and_when_all_are_it_is_429(two: Any) -> None:
    first, second = two.routers
    first.says(FULL)
    second.says("Hello")
    for _ in range(3):
        assert await text_of(await two.complete()) == "Hello"
    assert first.asked
    second.says(FULL)
    reply = await two.complete()
    error = reply.json()["error"]
    assert (reply.status_code, error["type"], error["code"]) == (429, "rate_limit_error", "queue_full")
    assert "takes at most 1" in error["message"]
    assert 1 <= int(reply.headers["retry-after"]) <= 60
    first.says("Hello")
    assert await text_of(await two.complete()) == "Hello"


async def test_who_has_begun_waits_for_room_at_the_other(two: Any) -> None:
    for router in two.routers:
        router.says("Hello", 30.0)
    request = asyncio.ensure_future(two.complete())
    lost, other = await until_asked(two, 1)
    await until_read(two, 1)
    other.says(FULL)
    other.plan = lambda message: ["Hello world"] if len(other.asked) > 2 else ["Hello", FULL]
    await stop(two, lost)
    assert await text_of(await request) == "Hello world"
    assert len(other.asked) == 3


async def test_the_work_of_a_router_that_lives_on_is_cancelled_there(two: Any) -> None:
    for router in two.routers:
        router.says("Hello", 30.0)
    request = asyncio.ensure_future(two.complete())
    lost, other = await until_asked(two, 1)
    await until_read(two, 1)
    await cut(two, lost)
    await until(lambda: other.asked)
    await until(lambda: list(lost.ended.values()) == ["link_lost"])
    request.cancel()  # The client leaves: what goes on now ends, too.
    await until(lambda: list(other.ended.values()) == ["cancelled"])
    assert [counts.num_in_flight for counts in two.frontend._routers.counts.values()] == [0, 0]


async def test_the_time_limit_is_one_for_all_routers(open_door: Any) -> None:
    door = await open_door(num_routers=2, request_timeout_s=0.6)
    for router in door.routers:
        router.says(30.0)
    begin = door.frontend.node.clock.now()
    request = asyncio.ensure_future(door.complete())
    lost, other = await until_asked(door)
    await asyncio.sleep(0.3)
    await stop(door, lost)
    reply = await request
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
    assert other.asked
    assert num_tokens(other.asked[0].prompt) > 0
    assert door.frontend.node.clock.now() - begin >= 0.6
