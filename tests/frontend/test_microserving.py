"""MLC-LLM's REST before a real tiny model: a router written for it drives the engines, and the oracle holds."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from oracle import assert_tokens_pass_oracle

from callboard.actors.protocol import SamplingParams

from .mlc_fleet import NUM_NEW, Served, assert_right, prepare, refused, served_fleet, tokens_of, until_free


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with served_fleet(tmp_path_factory.mktemp("mlc")) as served:
        yield served
        await served.fleet.assert_nothing_leaks()


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("engines", [("e0",), ("e0", "e1")])
@pytest.mark.parametrize("way", ["round-robin", "disaggregated", "balanced"])
async def test_a_router_written_for_mlc_drives_the_fleet(
    served: Served, way: str, engines: tuple[str, ...], is_streamed: bool
) -> None:
    balance = 0.3 if way == "balanced" else 0.0
    router = served.router(*engines, is_disaggregated=way != "round-robin", balance=balance)
    prompts = [served.prompt(40), served.prompt(17), served.prompt(3)]
    prompts.append(prompts[0][:30] + served.prompt(9))

    async def ask(number: int, prompt: list[int]) -> list[dict[str, Any]]:
        body = served.body(prompt, stream=is_streamed)
        return [each async for each in router.handle(f"{way}-{len(engines)}-{is_streamed}-{number}", body)]

    answers = [await ask(0, prompts[0]), *await asyncio.gather(*(ask(i, p) for i, p in enumerate(prompts) if i))]
    for prompt, responses in zip(prompts, answers, strict=True):
        assert len(tokens_of(responses)) == NUM_NEW
        assert_tokens_pass_oracle(served.model, prompt, tokens_of(responses), SamplingParams(max_tokens=NUM_NEW))
        *_, before, last = [None, *responses]
        if is_streamed and way == "round-robin":  # A completion as OpenAI has it: its usage is to be asked for.
            assert last["choices"][0]["finish_reason"] == "length"
            continue
        usage = last["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(prompt), NUM_NEW)
        assert ((before or last)["choices"] or before["choices"])[0]["finish_reason"] == "length"
        assert bool(last["choices"]) != is_streamed
    assert router.num_running == [0] * len(engines)


async def test_what_moves_is_kv_and_only_what_lacks(served: Served) -> None:
    router = served.router("e0", "e1", is_disaggregated=True)
    prompt = served.prompt(70)
    body = prepare(served, "moves", prompt)
    first = await router.post(1, "prep_recv", {**body, "end": -1})
    assert first["prefix_matched_length"] == 0
    assert await served.holds("e1") == 1
    sent = {"begin": 0, "end": 69, "kv_addr_info": first["kv_append_metadata"], "recv_rank": 1}
    assert await router.post(0, "remote_send", {**body, **sent}) == {}
    assert await router.post(0, "remote_send", {**body, **sent}) == {}, "a repeat gets the same answer"
    answer = await served.http.post(f"{served.url('e1')}/microserving/start_generate", json={**body, "begin": -1})
    usage = answer.json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 69
    assert await served.holds("e1") == 0
    again = await router.post(1, "prep_recv", {**prepare(served, "again", prompt), "end": -1})
    assert again["prefix_matched_length"] == 64, "whole blocks are matched, and never the last token"
    other = served.router("e1", "e0", is_disaggregated=True)
    behind = await other.post(1, "prep_recv", {**prepare(served, "behind", prompt), "end": 10})
    assert behind["prefix_matched_length"] == 10, "e0 has computed more than is asked for"
    await until_free(served)


async def test_the_kv_that_was_sent_is_what_is_generated_from(served: Served) -> None:
    router = served.router("e0", "e1", is_disaggregated=True)
    prompt = served.prompt(33)
    body = prepare(served, "poisoned", prompt)
    prepared = await router.post(1, "prep_recv", {**body, "end": 20})
    sent = {"begin": 0, "end": 20, "kv_addr_info": prepared["kv_append_metadata"], "recv_rank": 1}
    await router.post(0, "remote_send", {**body, **sent})
    response = await served.http.post(f"{served.url('e1')}/microserving/start_generate", json={**body, "begin": 20})
    assert response.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 20
    assert_right(served, prompt, response.json())


@pytest.mark.parametrize(
    ("verb", "changes", "status", "param", "says"),
    [
        ("prep_recv", {"end": 40}, 400, None, "one token must be left"),
        ("prep_recv", {"end": -41}, 400, None, "before the prompt"),
        ("prep_recv", {"end": 41}, 400, None, "past the prompt"),
        ("prep_recv", {"end": "x"}, 400, "end", "expected `int`"),
        ("prep_recv", {}, 400, "end", "Missing"),
        ("prep_recv", {"end": -1, "user": None}, 400, "user", "the request's id"),
        ("prep_recv", {"end": -1, "user": "a b"}, 400, "user", "the request's id"),
        ("prep_recv", {"end": -1, "n": 2}, 400, "prompt", "one prompt"),
        ("prep_recv", {"end": -1, "model": "other"}, 404, "model", "serves 'tiny'"),
        ("prep_recv", {"end": -1, "prompt": [5] * 600}, 400, "prompt", "maximum context"),
        ("remote_send", {"begin": 0, "end": 9, "kv_addr_info": "never!"}, 400, "kv_addr_info", "prep_recv"),
        ("remote_send", {"begin": 0, "end": 9, "kv_addr_info": "A" * 5000}, 400, "kv_addr_info", "characters"),
        ("remote_send", {"begin": 0, "end": 9, "kv_addr_info": "gASVBQ=="}, 400, "kv_addr_info", "prep_recv"),
        ("remote_send", {"begin": 0, "end": 9, "kv_addr_info": "lAGja3Zho2VwY6Jy"}, 400, "kv_addr_info", "prep_recv"),
        ("start_generate", {"begin": 40}, 400, None, "one token at least"),
        ("start_generate", {"begin": -41}, 400, None, "one token at least"),
        ("start_generate", {"max_tokens": 0}, 400, "max_tokens", ">= 1"),
    ],
)
async def test_what_is_wrong_is_said_as_openai_says_it(
    served: Served, verb: str, changes: dict[str, Any], status: int, param: str | None, says: str
) -> None:
    router = served.router("e1", is_disaggregated=True)
    body = {**prepare(served, "wrong", served.prompt(40)), **changes}
    found, error = await refused(router, 0, verb, body)
    assert (found, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert says in error["message"]
    assert await served.holds("e1") == 0


async def test_engines_and_paths_that_are_not_there_are_told(served: Served) -> None:
    status, error = await refused(served.router("e7", is_disaggregated=True), 0, "prep_recv", {})
    assert (status, error["code"]) == (404, "engine_not_found")
    assert "'e0', 'e1'" in error["message"]
    assert (await served.http.get(f"{served.url('e0')}/microserving/prep_recv")).status_code == 405
    assert (await served.http.post(f"{served.url('e0')}/microserving/elsewhere")).json()["error"][
        "code"
    ] == "unknown_url"
    assert (await served.http.get(f"{served.url('e0')}/v1/models")).json()["data"][0]["id"] == "tiny"
    text = (await served.http.get(f"{served.frontend.url}/metrics")).text
    assert 'endpoint="microserving_prep_recv",model_name="",status="404"' in text
    assert "e7" not in text
