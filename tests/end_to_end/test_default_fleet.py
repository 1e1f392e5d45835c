"""The default fleet as its users have it: processes, SmolLM2, HTTP, the openai client."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import httpx
import openai
import pytest
from oracle import assert_tokens_pass_oracle
from transformers import PreTrainedModel
from waiting import PATIENCE_S

from callboard.actors.protocol import GetKvStats, SamplingParams
from callboard.bus import Node
from callboard.tools.running import RunningFleet, find_fleet

pytestmark = pytest.mark.smollm2
MODEL = "smollm2-135m"
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
NAME = f"test-{os.getpid()}"


def callboard(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "callboard.tools.cli", *arguments]
    return subprocess.run(command, check=check, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def fleet() -> Iterator[RunningFleet]:
    callboard("up", "--detach", "--name", NAME, "--port", "0")
    try:
        yield find_fleet(NAME)
    finally:
        callboard("down", NAME, check=False)  # The last test kills its launcher.


@pytest.fixture
async def client(fleet: RunningFleet) -> Any:
    async with openai.AsyncOpenAI(base_url=f"{fleet.state.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def assert_all_blocks_come_back(fleet: RunningFleet) -> None:
    managers = json.loads(callboard("ps", NAME, "--json").stdout)[0]["actors"]
    names = [row["name"] for row in managers if row["kind"] == "kv_manager"]
    assert len(names) == 2
    async with Node(f"test-{os.getpid()}", fleet=NAME) as node, asyncio.timeout(PATIENCE_S):
        for name in names:
            address = type(fleet.state.directory)(name, f"ipc://{fleet.folder}/{name}.sock", name)
            while True:
                stats = await node.ref(address).ask(GetKvStats(recall=True))
                assert not stats.problems
                if stats.free + stats.cached == stats.num_blocks:
                    break
                await asyncio.sleep(0.05)


async def test_models_completions_and_chat(client: openai.AsyncOpenAI) -> None:
    assert [model.id for model in (await client.models.list()).data] == [MODEL]
    completion = await client.completions.create(
        model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=5
    )
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 5
    chat = await client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=32)
    assert "Paris" in (chat.choices[0].message.content or "")
    assert chat.choices[0].finish_reason == "stop"


async def test_streams_say_what_the_whole_says(client: openai.AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=32)
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        temperature=0,
        max_tokens=32,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


async def test_stop_n_and_seed(client: openai.AsyncOpenAI) -> None:
    stopped = await client.completions.create(
        model=MODEL, prompt="1, 2, 3, 4, 5,", temperature=0, max_tokens=40, stop=[" 8"]
    )
    assert stopped.choices[0].text == " 6, 7,"
    assert stopped.choices[0].finish_reason == "stop"

    async def two(seed: int) -> list[str | None]:
        reply = await client.chat.completions.create(
            model=MODEL, messages=QUESTION, n=2, seed=seed, temperature=1.0, max_tokens=12
        )
        assert [choice.index for choice in reply.choices] == [0, 1]
        return [choice.message.content for choice in reply.choices]

    first = await two(5)
    assert first[0] != first[1]
    assert await two(5) == first
    assert await two(6) != first


BAD_INPUT: list[tuple[str, Any, int, str]] = [
    ("completions", b"{", 400, "JSON"),
    ("completions", {"model": "gpt-4", "prompt": "x"}, 404, "gpt-4"),
    ("completions", {"model": MODEL, "prompt": 5}, 400, "prompt"),
    ("completions", {"model": MODEL, "prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
    ("completions", {"model": MODEL, "prompt": "x", "max_tokens": 10**6}, 400, "8192"),
    ("completions", {"model": MODEL, "prompt": "x", "max_tokens": "many"}, 400, "max_tokens"),
    ("completions", {"model": MODEL, "prompt": [5] * 9000}, 400, "8192"),
    ("completions", {"model": MODEL, "prompt": [10**6]}, 400, "token"),
    ("completions", {"model": MODEL, "prompt": ""}, 400, "prompt"),
    ("chat/completions", {"model": MODEL, "messages": []}, 400, "messages"),
    ("chat/completions", {"model": MODEL, "messages": "hello"}, 400, "messages"),
    ("chat/completions", {"model": MODEL, "messages": QUESTION, "temperature": -1}, 400, "temperature"),
    ("chat/completions", {"model": MODEL, "messages": QUESTION, "n": 1000}, 400, "n"),
]


async def test_bad_input_gets_an_error_in_openais_shape_and_the_fleet_serves_on(fleet: RunningFleet) -> None:
    async with httpx.AsyncClient(base_url=fleet.state.url or "", timeout=60) as http:
        for path, body, status, says in BAD_INPUT:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            response = await http.post(f"/v1/{path}", content=content, headers={"content-type": "application/json"})
            assert response.status_code == status, (body, response.text)
            error = response.json()["error"]
            assert says in error["message"]
            assert set(error) == {"message", "type", "param", "code"}
        good = await http.post("/v1/completions", json={"model": MODEL, "prompt": "Hello", "max_tokens": 1})
        assert good.status_code == 200


async def test_64_clients_stream_at_once_and_every_answer_passes_the_oracle(
    fleet: RunningFleet, client: openai.AsyncOpenAI, smollm2: PreTrainedModel
) -> None:
    rng = Random(64)

    async def one(i: int) -> tuple[list[int], list[int], SamplingParams]:
        prompt = [rng.randrange(100, 40_000) for _ in range(rng.randrange(4, 40))]
        sampling = SamplingParams(max_tokens=rng.randrange(6, 13), temperature=rng.choice([0.0, 0.8]), seed=i)
        stream = await client.completions.create(
            model=MODEL,
            prompt=prompt,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            seed=i,
            stream=True,
            timeout=240,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        tokens: list[int] = []
        async for chunk in stream:
            tokens += chunk.choices[0].token_ids  # type: ignore[attr-defined]
        return prompt, tokens, sampling

    results = await asyncio.gather(*(one(i) for i in range(64)))
    for prompt, tokens, sampling in results:
        assert len(tokens) == sampling.max_tokens
        assert_tokens_pass_oracle(smollm2, prompt, tokens, sampling)
    await assert_all_blocks_come_back(fleet)


async def test_clients_that_leave_give_everything_back(fleet: RunningFleet, client: openai.AsyncOpenAI) -> None:
    async def leave(i: int) -> None:
        stream = await client.chat.completions.create(model=MODEL, messages=QUESTION, stream=True, max_tokens=500)
        async for _ in stream:
            break
        await stream.close()

    async def give_up(i: int) -> None:
        try:
            async with asyncio.timeout(0.03 * i):
                await client.completions.create(model=MODEL, prompt=f"Story {i}: " * 50, max_tokens=500)
        except TimeoutError:
            pass

    async with asyncio.TaskGroup() as group:
        for i in range(8):
            group.create_task(leave(i))
            group.create_task(give_up(i))
    await assert_all_blocks_come_back(fleet)


async def test_the_last_requests_sub_requests_are_shown(fleet: RunningFleet, client: openai.AsyncOpenAI) -> None:
    raw = await client.chat.completions.with_raw_response.create(
        model=MODEL, messages=[{"role": "user", "content": "Name a colour."}], max_tokens=4
    )
    parts = json.loads(callboard("requests", raw.headers["x-request-id"], "--fleet", NAME, "--json").stdout)
    assert [(part["verb"], part["actor"]) for part in parts] == [
        ("prep_recv", "decode"),
        ("remote_send", "prefill"),
        ("start_generate", "decode"),
    ]
    sent = parts[1]
    assert sent["lane"] == "shm"
    assert sent["num_bytes"] > 0
    assert sent["num_computed_tokens"] > 0
    assert "remote_send" in callboard("requests", "--fleet", NAME).stdout


async def test_a_killed_engine_comes_back_and_serves(fleet: RunningFleet, client: openai.AsyncOpenAI) -> None:
    def decode_pid() -> int:
        rows = json.loads(callboard("ps", NAME, "--json").stdout)[0]["actors"]
        return next((row["pid"] for row in rows if row["name"] == "decode" and row["state"] == "ready"), 0)

    pid = decode_pid()
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while decode_pid() in (0, pid):
        assert time.monotonic() < deadline, "the engine did not come back"
        await asyncio.sleep(0.2)
    reply = await client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=32)
    assert "Paris" in (reply.choices[0].message.content or "")
    await assert_all_blocks_come_back(fleet)


def test_nothing_is_left_when_the_launcher_is_killed(fleet: RunningFleet) -> None:
    (found,) = json.loads(callboard("ps", NAME, "--json").stdout)
    pids = {actor["pid"] for actor in found["actors"]}
    os.kill(fleet.state.launcher_pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids) or fleet.folder.exists():
        assert time.monotonic() < deadline, [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        time.sleep(0.05)
