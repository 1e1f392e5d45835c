"""/metrics, /health/live and /health/ready of one frontend, and what it says of its requests on the bus."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from served_fleet import Scraped, samples_of, value
from waiting import PATIENCE_S

from callboard.actors.directory import Directory
from callboard.actors.frontend.frontend import ServedModel
from callboard.actors.protocol import Entry, ListEntries, Register, Token, Unregister, Usage
from callboard.actors.stats_protocol import FrontendStats, GetFrontendStats
from callboard.bus import ActorDied, Address

OpenDoor = Callable[..., Awaitable[Any]]


async def scrape(door: Any) -> Scraped:
    answer = await door.http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return samples_of(answer.text)


async def ended(door: Any, count: int) -> Scraped:
    """Wait until so many requests have ended, and scrape: what a client has read may not be counted yet."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            found = await scrape(door)
            if sum(number for (name, _), number in found.items() if name == "callboard_requests_total") == count:
                return found
            await asyncio.sleep(0.01)


async def test_a_scrape_says_exactly_what_was_asked_and_answered(door: Any) -> None:
    usage = Usage(9, 4, 5, 0, queue_s=0.25, prefill_s=0.5, decode_s=1.0)
    door.router.says(1, 1, 1, Token(3, 1, None, "length", usage))
    for stream in (False, True, True):
        answer = await door.complete(max_tokens=4, stream=stream)
        assert answer.status_code == 200
    num_prompt = len(door.frontend._models["tiny"].tokenizer.encode("the quick", add_special_tokens=True))
    found = await ended(door, 3)
    assert value(found, "callboard_requests_total", model_name="tiny", endpoint="completions", status="200") == 3
    assert value(found, "callboard_inflight_requests", model_name="tiny") == 0
    assert value(found, "callboard_time_to_first_token_seconds_count") == 3
    assert value(found, "callboard_inter_token_latency_seconds_count") == 3 * 3
    assert value(found, "callboard_request_time_per_output_token_seconds_count") == 3
    assert value(found, "callboard_e2e_request_latency_seconds_count") == 3
    assert value(found, "callboard_request_prompt_tokens_sum") == 3 * num_prompt
    assert value(found, "callboard_request_generation_tokens_sum") == 3 * 4
    assert value(found, "callboard_request_queue_time_seconds_sum") == 3 * 0.25
    assert value(found, "callboard_request_prefill_time_seconds_sum") == 3 * 0.5
    assert value(found, "callboard_request_decode_time_seconds_sum") == 3 * 1.0
    assert value(found, "callboard_request_decode_time_seconds_bucket", le="0.8") == 0
    assert value(found, "callboard_request_decode_time_seconds_bucket", le="1.0") == 3
    assert value(found, "process_resident_memory_bytes") > 1e6


async def test_times_are_those_that_passed(door: Any) -> None:
    door.router.says(0.2, 1, 0.1, 1, 0.1, 1)
    await door.complete(max_tokens=3)
    found = await ended(door, 1)
    ttft = value(found, "callboard_time_to_first_token_seconds_sum")
    gaps = value(found, "callboard_inter_token_latency_seconds_sum")
    whole = value(found, "callboard_e2e_request_latency_seconds_sum")
    # A token may be late, and is then nearer to the next: only sums have lower ends. Timers are early by a bit.
    assert ttft >= 0.19
    assert 0.39 <= ttft + gaps <= whole
    assert gaps > 0.0
    assert value(found, "callboard_request_time_per_output_token_seconds_sum") == pytest.approx(gaps / 2)


async def test_every_choice_has_tokens_and_the_request_has_one_first(door: Any) -> None:
    door.router.says(1, 1, 1)
    await door.complete(max_tokens=3, n=4)
    found = await ended(door, 1)
    assert value(found, "callboard_time_to_first_token_seconds_count") == 1
    assert value(found, "callboard_inter_token_latency_seconds_count") == 4 * 2
    assert value(found, "callboard_request_generation_tokens_sum") == 4 * 3


async def test_what_fails_is_told_by_its_status_and_a_model_that_is_not_served_makes_no_label(door: Any) -> None:
    await door.http.post("/v1/completions", json={"model": "no-such-model", "prompt": "x"})
    await door.complete(prompt="x " * 400)
    door.router.says(ActorDied("it died"))
    await door.complete()
    door.router.says(1, ActorDied("it died"))
    assert "error" in (await door.chat(stream=True)).text
    found = await ended(door, 4)
    statuses = {
        (labels["model_name"], labels["endpoint"], labels["status"])
        for (name, known), _ in found.items()
        if name == "callboard_requests_total" and (labels := dict(known))
    }
    assert statuses == {
        ("", "completions", "404"),
        ("tiny", "completions", "400"),
        ("tiny", "completions", "503"),
        ("tiny", "chat_completions", "503"),
    }
    assert value(found, "callboard_e2e_request_latency_seconds_count") == 0
    assert value(found, "callboard_time_to_first_token_seconds_count") == 1


async def test_a_client_that_leaves_is_counted_as_such(door: Any) -> None:
    door.router.says("Hello", 30.0)
    async with door.http.stream("POST", "/v1/completions", json={"model": "tiny", "prompt": "a", "stream": True}) as r:
        await anext(r.aiter_lines())
        assert value(await scrape(door), "callboard_inflight_requests", model_name="tiny") == 1
    found = await ended(door, 1)
    assert value(found, "callboard_requests_total", status="499") == 1
    assert value(found, "callboard_inflight_requests", model_name="tiny") == 0


async def test_openmetrics_is_given_to_who_accepts_it_and_nonsense_gets_the_plain_text(door: Any) -> None:
    await door.complete()
    accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
    answer = await door.http.get("/metrics", headers={"accept": accept})
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    names = {family.name for family in parse_openmetrics(answer.text)}
    assert {"callboard_requests", "callboard_time_to_first_token_seconds", "process_cpu_seconds"} <= names
    for accept in ("application/openmetrics-text; version=none", "text/plain; version=1.x", "x" * 1000, ";;,="):
        answer = await door.http.get("/metrics", headers={"accept": accept})
        assert answer.status_code == 200
        assert samples_of(answer.text)


async def test_neither_prompts_nor_keys_get_into_metrics(open_door: OpenDoor) -> None:
    door = await open_door(api_keys=("sk-topsecret",))
    headers = {"authorization": "Bearer sk-topsecret", "x-request-id": "my-id-7"}
    body = {"model": "tiny", "prompt": "marzipan", "user": "somebody"}
    await door.http.post("/v1/completions", json=body, headers=headers)
    await door.http.post("/v1/completions", json={**body, "model": "marzipan"}, headers=headers)
    await ended(door, 2)
    text = (await door.http.get("/metrics")).text
    assert not any(word in text for word in ("marzipan", "topsecret", "my-id-7", "somebody"))


async def test_metrics_and_health_are_open_where_the_api_wants_keys(open_door: OpenDoor) -> None:
    door = await open_door(api_keys=("secret",))
    assert (await door.complete()).status_code == 401
    for path in ("/metrics", "/health", "/health/live", "/health/ready"):
        assert (await door.http.get(path)).status_code == 200


async def test_ready_says_in_sentences_what_is_missing_and_live_is_always_200(
    open_door: OpenDoor, model_dir: Any
) -> None:
    served = ServedModel(str(model_dir), 256, roles=("decode", "prefill"))
    door = await open_door(directory=Directory(), models={"tiny": served})
    directory = door.frontend.directory
    router = Entry("main", "router", door.router.ref.address)

    def engine(name: str, *roles: str) -> Entry:
        return Entry(name, "engine", Address("n", "inproc://n", name), model="tiny", roles=roles)

    async def ready() -> tuple[int, list[str]]:
        assert (await door.http.get("/health/live")).json() == {"status": "ok", "missing": []}
        answer: httpx.Response = await door.http.get("/health/ready")
        return answer.status_code, answer.json()["missing"]

    async def until(expected: tuple[int, list[str]]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while await ready() != expected:
                await asyncio.sleep(0.02)

    no_engine, no_router = "model tiny has no ready engine", "router router is not there"
    await until((503, [no_router, f"{no_engine} for decode and prefill"]))
    await directory.ask(Register(router, 60.0))
    await until((503, [f"{no_engine} for decode and prefill"]))
    await directory.ask(Register(engine("p", "prefill"), 60.0))
    await until((503, [f"{no_engine} for decode"]))
    await directory.ask(Register(engine("d", "decode"), 60.0))
    await until((200, []))
    assert len((await directory.ask(ListEntries())).entries) == 4
    await directory.ask(Unregister("p"))
    await until((503, [f"{no_engine} for prefill"]))


async def test_the_bus_tells_of_the_last_minute(door: Any) -> None:
    async def stats() -> FrontendStats:
        answer: FrontendStats = await door.router.node.ref(address).ask(GetFrontendStats())
        return answer

    address = door.frontend.ref.address
    empty = (await stats()).everything
    assert (empty.num_ended, empty.ttft.p50) == (0, None)
    door.router.says(0.05, 1, 1, 1)
    await asyncio.gather(*(door.complete(max_tokens=3) for _ in range(10)))
    await ended(door, 10)
    [tiny] = (await stats()).models
    assert (tiny.model, tiny.num_ended, tiny.num_failed, tiny.num_left, tiny.num_in_flight) == ("tiny", 10, 0, 0, 0)
    assert (tiny.ttft.count, tiny.itl.count, tiny.e2e.count) == (10, 20, 10)
    assert tiny.num_generated_tokens == 30
    assert 0.05 * 0.95 < tiny.ttft.p50 <= tiny.ttft.p95 <= tiny.ttft.p99
    assert tiny.ttft.p50 < tiny.e2e.p99
