"""Fleets of real processes under load, and a request of theirs that failed: what is known of where the time went."""

import asyncio
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from byte_tokenizer import write_byte_tokenizer
from real_fleet import RealFleet, real_fleet
from waiting import PATIENCE_S

from callboard.actors.engine.simulated import Simulation
from callboard.actors.node_spec import ActorSpec
from callboard.actors.protocol import ListEntries
from callboard.tools.trace.breakdown import breakdown
from callboard.tools.trace.past import collect
from callboard.tools.trace.story import Story, assemble

NUM_REQUESTS = int(os.environ.get("CALLBOARD_TEST_REQUESTS", "20"))
CONCURRENCY = 16
COSTS = Simulation(
    num_layers=8,
    vocab_size=256,
    seconds_per_step=0.012,
    seconds_per_prefill_token=1e-4,
    seconds_per_decode=0.001,
)


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[RealFleet]:
    """A prefill and a decode engine, their managers, and a frontend beside the router, each in its process."""
    folder = tmp_path / "model"
    folder.mkdir()
    shape = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": 8192, "vocab_size": 256}
    (folder / "config.json").write_bytes(msgspec.json.encode(shape))
    write_byte_tokenizer(folder)
    async with real_fleet(tmp_path) as fleet:
        served = {"tiny": {"path": str(folder), "max_model_len": 8192}}
        router = msgspec.to_builtins(fleet.address("control", "main"))
        config = {"router": router, "models": served, "port": 0, "patience_s": 2.0}
        frontend = ActorSpec("frontend", "callboard.actors.frontend.frontend:Frontend", config)
        p = fleet.engine("p", COSTS, num_blocks=2048, roles=["prefill"])
        d = fleet.engine("d", COSTS, num_blocks=2048, roles=["decode"])
        await fleet.start(fleet.directory(), *p, *d, fleet.router(frontend, script="disaggregate", patience_s=2.0))
        yield fleet


async def http_of(fleet: RealFleet) -> httpx.AsyncClient:
    directory = fleet.client.ref(fleet.address("directory", "directory"))
    async with asyncio.timeout(PATIENCE_S):
        while True:
            entries = {entry.name: entry for entry in (await directory.ask(ListEntries())).entries}
            if entries.keys() >= {"frontend", "p", "d"}:
                return httpx.AsyncClient(base_url=str(entries["frontend"].detail["url"]), timeout=60)
            await asyncio.sleep(0.02)


async def ask(http: httpx.AsyncClient, request_id: str, **body: Any) -> httpx.Response:
    asked = {"model": "tiny", "ignore_eos": True, **body}
    return await http.post("/v1/completions", json=asked, headers={"x-request-id": request_id})


async def stories_of(fleet: RealFleet) -> dict[str, Story]:
    """Return what the fleet remembers; wait until the last of it is noted."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            past = await collect(fleet.client, fleet.address("directory", "directory"))
            stories = assemble(past.events)
            if all(story.end is not None for story in stories.values()):
                return stories
            await asyncio.sleep(0.1)


async def test_of_each_request_under_load_98_percent_of_the_time_is_explained(fleet: RealFleet) -> None:
    async with await http_of(fleet) as http:
        # The first one loads code and ties the managers.
        assert (await ask(http, "first", prompt="warm", max_tokens=2)).status_code == 200
        free = asyncio.Semaphore(CONCURRENCY)

        async def one(index: int) -> None:
            async with free:
                prompt = "".join(random.Random(index).choices("abcdefgh", k=40 + 37 * index % 800))
                tokens = 12 + index % 24
                reply = await ask(http, f"load-{index}", prompt=prompt, max_tokens=tokens, stream=index % 2 == 1)
                assert reply.status_code == 200, reply.text

        await asyncio.gather(*(one(index) for index in range(NUM_REQUESTS)))
    stories = await stories_of(fleet)
    found = {name: breakdown(story) for name, story in stories.items() if name.startswith("load-")}
    assert len(found) == NUM_REQUESTS
    for name, each in found.items():
        assert each.share >= 0.98, (name, each.share, sorted(each.gaps, key=lambda gap: -gap.seconds)[:3])
        assert each.explained_s + each.unexplained_s == pytest.approx(each.jct_s)
    for story in stories.values():
        assert [span.name for span in story.sub_requests] == ["prep_recv", "remote_send", "start_generate"]
        assert len(story.roots) == 1
        assert story.script == "disaggregate"
        for span in story.spans:
            assert span.end is not None, span
            if span.parent is not None and span.parent.end is not None:
                assert span.parent.begin <= span.begin, (span, span.parent)


async def test_a_killed_engine_leaves_a_story_that_says_where_it_failed(fleet: RealFleet) -> None:
    body = {"model": "tiny", "prompt": "x" * 50, "max_tokens": 4000, "ignore_eos": True, "stream": True}
    async with (
        await http_of(fleet) as http,
        http.stream("POST", "/v1/completions", json=body, headers={"x-request-id": "victim"}) as reply,
    ):
        lines = reply.aiter_lines()
        await anext(lines)
        await fleet.kill("d")
        assert '"error"' in [line async for line in lines if line][-1]
    story = (await stories_of(fleet))["victim"]
    # The router tries again, as nobody but the dead one decodes here.
    starts = [span for span in story.sub_requests if span.name == "start_generate"]
    start = starts[0]
    assert start.error.startswith("ActorDied")
    assert start.num_items > 0
    # What the engine knew died with it.
    assert not [span for span in story.spans if span.actor == "d" and span.kind != "call"]
    assert {span.actor for span in story.spans if span.name == "compute"} == {"p"}
    found = breakdown(story)
    assert found.is_over
    longest = max(found.gaps, key=lambda gap: gap.seconds)
    assert any(each.begin <= longest.begin and longest.end <= (each.end or 0.0) for each in starts)
