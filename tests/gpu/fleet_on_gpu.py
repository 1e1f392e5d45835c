"""Two engines on one GPU, end to end: processes of their own, a real model, a router that disaggregates.

Once with one KV manager, where a hand-off copies nothing; once with a manager each, between whose pools pages go by
``cuda_ipc``. Every token must pass the tests' oracle. Then the decode engine is killed while it generates, and started
again: its manager's pool has outlived it, so it finds the prompt's KV in place.
"""

import asyncio
import signal
import tempfile
from pathlib import Path
from typing import Any

import msgspec
from oracle import assert_tokens_pass_oracle
from real_fleet import RealFleet, real_fleet
from tiny_models import random_prompt, save_tiny_model, tiny_model

from callboard.actors.model_config import layout_of, read_model_config
from callboard.actors.node_spec import ActorSpec, NodeSpec
from callboard.actors.protocol import Generate, GetKvStats, GetSubRequests, SamplingParams, SubRequest, Token, Usage
from callboard.bus import BusError
from callboard.kv.tokens import pack_tokens

MODEL = "llama3"
NUM_BLOCKS = 128
GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)


class Served:
    """A fleet with a prefill and a decode engine; ``managers`` are one or two."""

    def __init__(self, fleet: RealFleet, model: Path, device: str, managers: tuple[str, ...]) -> None:
        self.fleet, self.model, self.device, self.managers = fleet, model, device, managers
        self.layout = layout_of(read_model_config(model))
        self._count = 0

    def manager(self, name: str) -> NodeSpec:
        config = {
            "name": name,
            "layout": msgspec.to_builtins(self.layout),
            "num_blocks": NUM_BLOCKS,
            "device": self.device,
            "socket_dir": str(self.fleet.folder / "pools"),
        }
        actor = ActorSpec(name, "callboard.actors.kv_manager:KvManager", config)
        num_bytes = NUM_BLOCKS * self.layout.block_bytes if self.device == "cpu" else None
        return self.fleet.node(name, "kv_manager", actor, pool_bytes=num_bytes)

    def engine(self, name: str, role: str, manager: str) -> NodeSpec:
        config = {
            "name": name,
            "model": "tiny",
            "path": str(self.model),
            "roles": [role],
            "device": self.device,
            "manager": msgspec.to_builtins(self.fleet.address(manager, manager)),
            "num_threads": 1,
        }
        return self.fleet.node(name, "engine", ActorSpec(name, "callboard.actors.engine.engine:Engine", config))

    async def start(self) -> None:
        await self.fleet.start(self.fleet.directory())
        await self.fleet.start(self.fleet.router(script="disaggregate"))
        await self.fleet.start(*(self.manager(name) for name in self.managers))
        self.decode = self.engine("d", "decode", self.managers[-1])
        await self.fleet.start(self.engine("p", "prefill", self.managers[0]), self.decode)

    async def generate(self, prompt: list[int]) -> tuple[str, list[int], Usage | None]:
        """Return the request's id, its tokens, and what it cost."""
        self._count += 1
        request_id, tokens, usage = f"request-{self._count}", list[int](), None
        router = self.fleet.client.ref(self.fleet.address("control", "main"))
        async with router.stream(Generate(request_id, "tiny", pack_tokens(prompt), GREEDY), timeout=60) as items:
            async for item in items:
                assert isinstance(item, Token)
                tokens.append(item.id)
                usage = item.usage
        return request_id, tokens, usage

    async def generate_once_known(self, prompt: list[int]) -> tuple[str, list[int], Usage | None]:
        """Generate as soon as the router has heard of both engines."""
        async with asyncio.timeout(30):
            while True:
                try:
                    return await self.generate(prompt)
                except BusError:
                    await asyncio.sleep(0.1)

    async def sends_of(self, request_id: str) -> list[SubRequest]:
        """Return what the router saw of each remote_send of a request."""
        router = self.fleet.client.ref(self.fleet.address("control", "main"))
        items = (await router.ask(GetSubRequests(request_id))).items
        return [item for item in items if item.verb == "remote_send"]

    async def assert_nothing_leaks(self) -> None:
        async with asyncio.timeout(20):
            for name in self.managers:
                manager = self.fleet.client.ref(self.fleet.address(name, name))
                while (stats := await manager.ask(GetKvStats(recall=True))).free + stats.cached != NUM_BLOCKS:
                    await asyncio.sleep(0.05)
                assert not stats.problems, stats.problems


async def serve(folder: Path, device: str, managers: tuple[str, ...]) -> list[dict[str, Any]]:
    """Serve prompts, then kill the decode engine, and serve one of them again."""
    model = save_tiny_model(MODEL, folder)
    plain, problem, lanes = tiny_model(MODEL), "", list[tuple[str, int]]()
    async with real_fleet(folder) as fleet:
        served = Served(fleet, model, device, managers)
        await served.start()
        prompts = [random_prompt(length, seed=length) for length in (40, 100, 161, 64)]
        await served.generate_once_known(prompts[0])  # Lanes are opened, kernels compiled.
        for _, tokens, _ in await asyncio.gather(*(served.generate(prompt) for prompt in prompts)):
            assert len(tokens) == GREEDY.max_tokens
        for prompt in (random_prompt(90 + i, seed=i) for i in range(4)):
            request_id, tokens, _ = await served.generate(prompt)
            lanes += [(send.lane, send.num_bytes) for send in await served.sends_of(request_id)]
            try:
                assert_tokens_pass_oracle(plain, prompt, tokens)
            except AssertionError as error:
                problem = problem or str(error)
        await served.assert_nothing_leaks()
        kinds = {lane for lane, _ in lanes}
        far = "shm" if device == "cpu" else "cuda_ipc"
        is_as_told = kinds == {far} if len(managers) == 2 else far not in kinds
        what = "two managers' pools" if len(managers) == 2 else "one manager's pool"
        rows = [
            {
                "test": f"two engines on {device} over {what}: every token passes the oracle, nothing leaks",
                "holds": not problem and is_as_told and len(lanes) == 4,
                "problem": problem,
                "lanes and bytes": sorted({f"{lane or 'none'}: {num_bytes}" for lane, num_bytes in lanes}),
            }
        ]
        rows.append(await outlives(served, plain))
        return rows


async def outlives(served: Served, plain: Any) -> dict[str, Any]:
    """Kill the decode engine under load, start it again, and ask for a prompt that it had cached."""
    prompt = random_prompt(160, seed=7)
    await served.generate(prompt)
    under_load = [asyncio.ensure_future(served.generate(random_prompt(60, seed=i))) for i in range(4)]
    await asyncio.sleep(0.2)
    served.fleet.signal("d", signal.SIGKILL)
    ended = await asyncio.gather(*under_load, return_exceptions=True)
    unexpected = [repr(each) for each in ended if isinstance(each, BaseException) and not isinstance(each, BusError)]
    while served.fleet.supervisor.states["d"].state != "failed":
        await asyncio.sleep(0.02)
    await served.fleet.start(served.decode)
    request_id, tokens, usage = await served.generate_once_known(prompt)
    again = await served.sends_of(request_id)
    assert_tokens_pass_oracle(plain, prompt, tokens)
    await served.assert_nothing_leaks()
    computed = len(prompt) if usage is None else usage.num_computed_tokens
    return {
        "test": "a killed decode engine comes back to the KV that its manager kept",
        "holds": computed <= 1
        and not unexpected
        and not any(send.num_bytes or send.num_computed_tokens for send in again),
        "tokens computed again": computed,
        "bytes sent again": sum(send.num_bytes for send in again),
        "problem": "; ".join(unexpected),
    }


def rows(device: str = "cuda:0") -> list[dict[str, Any]]:
    """Return what was found."""
    found = []
    for managers in (("kv",), ("kv-p", "kv-d")):
        with tempfile.TemporaryDirectory() as folder:
            found += asyncio.run(serve(Path(folder), device, managers))
    return found
