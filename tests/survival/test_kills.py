"""Processes that are killed under load: no request ends for it, and no token is lost or repeated."""

import asyncio
import os
import signal
import tempfile
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families
from survival.kills import ENGINES, NUM_STREAMS, ROUTERS, TWO_ROUTERS, Kills
from survival.served import Served, served
from tiny_models import tiny_model
from waiting import until


async def test_no_request_is_lost_when_engines_a_kv_manager_and_routers_are_killed() -> None:
    with tempfile.TemporaryDirectory(prefix="cbs", dir="/tmp") as folder:  # Unix sockets want short paths.
        with served(Path(folder), ENGINES, script="disaggregate", more=TWO_ROUTERS) as fleet:
            kills = Kills(fleet)
            await kills.run(4)
            assert len(kills.done) == 4
            await kill_all_routers(fleet)
            await fleet.assert_all_free()
        fleet.assert_answers_pass_oracle(tiny_model("llama3"))


async def kill_all_routers(fleet: Served) -> None:
    """Kill them at once, with every stream under way: who has begun waits for one to be back."""
    num_before, stop = num_rerouted(fleet), asyncio.Event()
    load = asyncio.ensure_future(fleet.keep_busy(NUM_STREAMS, stop))
    try:
        await until(lambda: sum(bool(answer.tokens and not answer.ended_s) for answer in fleet.answers) == NUM_STREAMS)
        for router in ROUTERS:
            os.kill(fleet.pid(router), signal.SIGKILL)
        await until(lambda: num_rerouted(fleet) >= num_before + NUM_STREAMS)
    finally:
        stop.set()
        await load


def num_rerouted(fleet: Served) -> float:
    """Return how many sequences the frontend has seen go on with another router."""
    text = httpx.get(f"{fleet.url}/metrics", trust_env=False).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return sum(sample.value for sample in samples if sample.name == "callboard_router_reroutes_total")
