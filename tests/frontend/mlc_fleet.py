"""Two engines of a real tiny model, their frontend with the microserving door, and what tests do with them."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from byte_tokenizer import write_byte_tokenizer
from fleet import Fleet, running_fleet
from oracle import assert_tokens_pass_oracle
from tiny_models import random_prompt, save_tiny_model, tiny_model

from callboard.actors.actor import start_actor, stop_actor
from callboard.actors.frontend.frontend import Frontend, ServedModel
from callboard.actors.model_config import layout_of, read_model_config
from callboard.actors.protocol import SamplingParams
from callboard.bus import Address

from .mlc_router import EngineRefused, MlcRouter

NUM_NEW = 12
LEASE_S = 1.0


class Served:
    """A fleet of two engines, its frontend, and a client."""

    def __init__(self, fleet: Fleet, frontend: Frontend, http: httpx.AsyncClient) -> None:
        self.fleet = fleet
        self.frontend = frontend
        self.http = http
        self.model = tiny_model("llama3")
        self.num_prompts = 0

    def url(self, engine: str) -> str:
        return f"{self.frontend.url}/engines/{engine}"

    def router(self, *engines: str, **options: Any) -> MlcRouter:
        return MlcRouter(self.http, [self.url(engine) for engine in engines], **options)

    def prompt(self, num_tokens: int = 40) -> list[int]:
        """Return a prompt nobody has had before, of the tokenizer's 256 ids."""
        self.num_prompts += 1
        return [3 + id % 250 for id in random_prompt(num_tokens, seed=self.num_prompts)]

    def body(self, prompt: list[int], **more: Any) -> dict[str, Any]:
        asked = {"model": None, "prompt": prompt, "max_tokens": NUM_NEW, "temperature": 0.0, "stream": False}
        return {**asked, "ignore_eos": True, "return_token_ids": True, **more}

    async def stats(self, engine: str) -> Any:
        return await self.fleet.stats(f"kv-{engine}")

    async def holds(self, engine: str) -> int:
        return int((await self.stats(engine)).num_reservations)


@asynccontextmanager
async def served_fleet(folder: Path, **options: Any) -> AsyncIterator[Served]:
    path = save_tiny_model("llama3", folder)
    write_byte_tokenizer(path)
    layout = layout_of(read_model_config(path))
    async with running_fleet(layout=layout, model=path, engines=("e0", "e1"), lease_s=LEASE_S, **options) as fleet:
        control = fleet.nodes["control"]
        models = {"tiny": ServedModel(str(path), 512)}
        frontend = Frontend(Frontend.Config(port=0, grace_s=1, models=models, microserving=True))
        directory = control.ref(Address("control", "inproc://control", "directory"))
        await start_actor(control, "frontend", frontend, directory=directory)
        try:
            async with httpx.AsyncClient(timeout=60) as http:
                await frontend._view.wait_for(lambda view: sum(e.kind == "engine" for e in view.entries) == 2)
                yield Served(fleet, frontend, http)
        finally:
            await stop_actor(frontend)


def tokens_of(responses: list[dict[str, Any]]) -> list[int]:
    return [id for each in responses for choice in each["choices"] for id in choice["token_ids"]]


async def refused(router: MlcRouter, index: int, verb: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    with pytest.raises(EngineRefused) as raised:
        await router.post(index, verb, body)
    return raised.value.status, raised.value.error


def prepare(served: Served, request_id: str, prompt: list[int], **more: Any) -> dict[str, Any]:
    return served.body(prompt, user=request_id, **more)


async def until_free(served: Served) -> None:
    """Wait until leases have ended what nobody came back for."""
    while await served.holds("e0") or await served.holds("e1"):
        await asyncio.sleep(0.05)
    await served.fleet.assert_nothing_leaks()


async def until_holds(served: Served, number: int) -> None:
    async with asyncio.timeout(10):
        while await served.holds("e1") != number:
            await asyncio.sleep(0.01)


@contextmanager
def long_leases(served: Served) -> Iterator[None]:
    """Have no lease end anything: what is given back is given back by the door."""
    tables = [served.fleet.actors[f"kv-{name}"].blocks.reservations for name in ("e0", "e1")]
    for table in tables:
        table.lease_s = 1000.0
    yield
    for table in tables:
        table.lease_s = LEASE_S


def assert_right(served: Served, prompt: list[int], response: dict[str, Any]) -> None:
    """Hold the tokens of one whole answer against the oracle."""
    assert_tokens_pass_oracle(served.model, prompt, tokens_of([response]), SamplingParams(max_tokens=NUM_NEW))
