"""The sides while they run: where they are asked, and their processes."""

import asyncio
import contextlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
from _strategies.processor import cpu_seconds

from callboard.actors.node_spec import NodeSpec
from callboard.actors.supervisor import Supervisor
from callboard.bus import Address, Node
from callboard.tools.endpoints import IPC, Endpoints
from callboard.tools.fleet_check import check_fleet
from callboard.tools.fleet_file import decode_fleet_file
from callboard.tools.machine import allowed_cores, claim_port, total_memory
from callboard.tools.plan import Machine, Planner

from .client import connect
from .events import MODELS, STEP_S, request

PEER = "vllm-router"
HERE = "127.0.0.1"
KINDS = ("raw", "fastapi")
NUM_WORKERS = 2
READY_S = 60.0
FLEET = """
version = 1
name = "{name}"
[listen]
http = "127.0.0.1:{port}"
frontends = {frontends}
[models.free]
path = "{model}"
[models.paced]
path = "{model}"
[defaults.kv]
size = "64MiB"
[[engine]]
name = "free"
model = "free"
runner = "simulated"
device = "cpu:0"
count = {workers}
[[engine]]
name = "paced"
model = "paced"
runner = "simulated"
device = "cpu:1"
count = {workers}
[[router]]
name = "main"
script = "round_robin"
count = {frontends}
max_queue = 4096
"""


@dataclass(frozen=True)
class Side:
    """Something that serves completions. ``workers`` and ``others`` are its processes."""

    name: str
    port: int
    workers: tuple[int, ...]
    others: tuple[int, ...]
    worker_ports: tuple[int, ...] = ()
    """Where its workers are asked themselves over HTTP, if they can be."""
    engine: Address | None = None
    """One of its engines of the model ``free``, to be asked over the bus."""

    def cpu_s(self) -> tuple[float, float]:
        """Return the processor seconds so far: the workers', and everybody else's."""
        return sum(map(cpu_seconds, self.workers)), sum(map(cpu_seconds, self.others))


def lacks_peer() -> str:
    """Say what keeps vllm-router from running here, "" if nothing does."""
    missing = [name for name in ("vllm_router", "fastapi") if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} is not installed (pip install -e '.[bench]')" if missing else ""


# ---- Callboard -----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def running_fleet(folder: Path, num_frontends: int) -> AsyncIterator[Side]:
    """Start what ``callboard up`` would: so many frontends, as many routers, and two simulated engines a model."""
    name, port = f"bench-{num_frontends}", claim_port(HERE, 0)
    model = folder / "model"
    if not model.exists():
        write_model(model)
    text = FLEET.format(name=name, port=port, frontends=num_frontends, workers=NUM_WORKERS, model=model)
    file = decode_fleet_file(text, source="the fleet that is measured", base=folder)
    check_fleet(file)
    run_dir = folder / name
    run_dir.mkdir(mode=0o700)
    (run_dir / "logs").mkdir()
    machine = Machine(allowed_cores(), total_memory())
    endpoints = Endpoints(IPC, run_dir)  # It holds the port of several frontends for as long as it is there.
    models = dict.fromkeys(MODELS, model)
    plan = Planner(file, run_dir=run_dir, models=models, machine=machine, port=port, endpoints=endpoints).plan()
    supervisor = Supervisor(environment=os.environ, grace_s=3.0)
    try:
        for stage in plan.stages:
            await supervisor.start([_paced(spec) for spec in stage])
        await until_served(port)
        states = supervisor.states.values()
        engines = tuple(state.pid for state in states if state.kind == "engine")
        others = tuple(state.pid for state in states if state.kind != "engine")
        (engine,) = (spec for spec in plan.nodes if spec.name == "free-0")
        yield Side(
            "Callboard" if num_frontends == 1 else f"Callboard, {num_frontends} frontends",
            port,
            engines,
            others,
            engine=Address(engine.name, engine.endpoint, engine.actors[0].name),
        )
    finally:
        supervisor.kill()
        endpoints.stop_listening()
        await supervisor.stop()


def _paced(spec: NodeSpec) -> NodeSpec:
    """Return the spec; of an engine of the model ``paced``, one whose steps take their time."""
    if spec.kind != "engine" or not spec.name.startswith("paced"):
        return spec
    (actor,) = spec.actors
    config = actor.config | {"simulated": {"seconds_per_step": STEP_S}}
    return msgspec.structs.replace(spec, actors=(msgspec.structs.replace(actor, config=config),))


@asynccontextmanager
async def node_beside(side: Side, folder: Path) -> AsyncIterator[Node]:
    """Yield a node that may ask a fleet's engines."""
    fleet = side.name and f"bench-{1 if side.name == 'Callboard' else side.name.split()[1]}"
    async with Node("bench", endpoint=f"ipc://{folder}/bench.sock", fleet=fleet) as node:
        yield node


def write_model(folder: Path) -> None:
    """Write a model directory whose every token is a word, so that each gives an event, and without weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir()
    settings = {"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 64}
    settings |= {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64}
    settings |= {"max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(settings))
    letters = [chr(code) for code in range(33, 127)] + ["Ġ"]
    words = [*letters, *(f"Ġword{id}" for id in range(len(letters), 512))]
    tokenizer = Tokenizer(models.BPE(vocab={word: id for id, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


# ---- vllm-router ---------------------------------------------------------------------------------------------------


@asynccontextmanager
async def running_peer(kind: str) -> AsyncIterator[Side]:
    """Start vllm-router in front of two mock workers of a kind."""
    ports = [claim_port(HERE, 0) for _ in range(NUM_WORKERS)]
    async with contextlib.AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(process_of("_router.worker", str(port), kind)) for port in ports]
        for port in ports:
            await until_served(port)
        port = claim_port(HERE, 0)
        urls = [f"http://127.0.0.1:{each}" for each in ports]
        options = ["--host", "127.0.0.1", "--port", str(port), "--policy", "round_robin", "--log-level", "error"]
        options += ["--worker-startup-check-interval", "1", "--prometheus-port", str(claim_port(HERE, 0))]
        launched = process_of("vllm_router.launch_router", *options, "--worker-urls", *urls)
        router = await stack.enter_async_context(launched)
        await until_served(port)
        yield Side(f"{PEER}, {kind} workers", port, tuple(w.pid for w in workers), (router.pid,), tuple(ports))


@asynccontextmanager
async def process_of(module: str, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    here, quiet = Path(__file__).parent.parent, asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *arguments, cwd=here, stdout=quiet, stderr=quiet
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def until_served(port: int) -> None:
    """Wait until both models are answered there. Raises RuntimeError if they are not in a minute."""
    give_up, why = time.monotonic() + READY_S, ""
    while time.monotonic() < give_up:
        try:
            with contextlib.closing(await connect(port)) as connection:
                for model in MODELS:
                    await connection.ask(request("127.0.0.1", model, 1, is_streamed=False))
                return
        except (OSError, RuntimeError) as error:
            why = str(error)
        await asyncio.sleep(0.1)
    raise RuntimeError(f"port {port} does not serve: {why}")
