"""A frontend on a real socket, before a router that says what a test scripts; a small tokenizer of bytes and merges."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvloop
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from callboard.actors.actor import Actor, start_actor, stop_actor
from callboard.actors.directory import Directory
from callboard.actors.frontend.frontend import Frontend, ServedModel
from callboard.actors.frontend.listener import bind
from callboard.actors.frontend.shared_port import SharedPort
from callboard.actors.frontend.tokenizer import Tokenizer
from callboard.actors.protocol import Entry, Generate, Token, Usage
from callboard.actors.registration import Registration
from callboard.bus import Node, current_call
from callboard.bus.transports.inproc import InprocHub
from callboard.kv.tokens import num_tokens, unpack_tokens

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = ["the quick brown fox jumps over the lazy dog", "Hello world, hello there", "schöne Grüße", "one two three"]
MAX_MODEL_LEN = 256


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a byte-level tokenizer of 320 ids and a ChatML template."""
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rust.train_from_iterator(CORPUS * 4, trainer)
    directory = tmp_path_factory.mktemp("model")
    rust.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "bos_token": {"content": "<|im_start|>"}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return directory


@pytest.fixture
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.load(model_dir, lambda: 0.0)


class ScriptedRouter(Actor):
    """Answers Generate by ``plan``: ids are tokens, floats pauses in seconds, strings their tokens, errors raised.

    A plan that ends without an error ends with the model's end token, or at ``max_tokens``. A request that another
    router has begun goes on behind what was sent, which must be the beginning of the plan.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.plan: Callable[[Generate], list[Any]] = lambda message: ["Hello world"]
        self.asked: list[Generate] = []
        self.ended: dict[str, str] = {}
        self.num_sent = 0
        self.all_ended = asyncio.Event()
        self._moved = asyncio.Event()

    async def start(self) -> None:
        self.registration = Registration(self, Entry(self.name, "router", self.ref.address))

    def says(self, *steps: Any) -> None:
        """Answer every request by these steps."""
        self.plan = lambda message: list(steps)

    async def until(self, predicate: Callable[[], bool]) -> None:
        """Wait for something that asking or sending a token brings about."""
        while not predicate():
            await self._move()

    async def until_quiet(self, seconds: float = 0.2) -> None:
        """Wait until no token has been sent for a while."""
        try:
            while True:
                async with asyncio.timeout(seconds):
                    await self._move()
        except TimeoutError:
            pass

    async def _move(self) -> None:
        self._moved.clear()
        await self._moved.wait()

    async def on_generate(self, message: Generate) -> AsyncIterator[Token]:
        self.asked.append(message)
        self.all_ended.clear()
        self._moved.set()
        call = current_call()
        assert call is not None
        outcome = "failed"
        try:
            async for token in self._tokens(message):
                self.num_sent += 1
                self._moved.set()
                yield token
            outcome = "done"
        except asyncio.CancelledError:
            outcome = call.ended
            raise
        finally:
            self.ended[message.request_id] = outcome
            if len(self.ended) == len(self.asked):
                self.all_ended.set()

    async def _tokens(self, message: Generate) -> AsyncIterator[Token]:
        position, sent = 0, unpack_tokens(message.prompt)[num_tokens(message.prompt) - message.num_output_tokens :]
        usage = Usage(num_tokens(message.prompt), 4, num_tokens(message.prompt) - 4, 0, 0.0, 0.0, 0.0)
        for step in self.plan(message):
            if isinstance(step, float | BaseException) and position < len(sent):
                continue
            if isinstance(step, float):
                await self.node.clock.sleep(step)
            elif isinstance(step, BaseException):
                raise step
            elif isinstance(step, Token):
                yield step
                return
            else:
                ids = [step] if isinstance(step, int) else self.tokenizer.encode(step, add_special_tokens=False)
                for id in ids:
                    if position < len(sent):
                        assert sent[position] == id, f"{sent} is not how this answer begins"
                        position += 1
                        continue
                    is_last = position + 1 == message.sampling.max_tokens
                    yield Token(position, id, -0.5, "length" if is_last else None, usage if is_last else None)
                    position += 1
                    if is_last:
                        return
        yield Token(position, self.tokenizer.eos_token_ids[0], -0.1, "stop", usage)


class Door:
    """A running frontend: its routers, an httpx client and an openai client, both over a real socket."""

    def __init__(self, frontend: Frontend, routers: list[ScriptedRouter], http: httpx.AsyncClient) -> None:
        self.frontend = frontend
        self.router, self.routers = routers[0], routers
        self.http = http
        self.openai = openai.AsyncOpenAI(base_url=f"{frontend.url}/v1", api_key="secret", max_retries=0)

    async def complete(self, **body: Any) -> httpx.Response:
        return await self.http.post("/v1/completions", json={"model": "tiny", "prompt": "the quick", **body})

    async def chat(self, **body: Any) -> httpx.Response:
        messages = [{"role": "user", "content": "Hello"}]
        return await self.http.post("/v1/chat/completions", json={"model": "tiny", "messages": messages, **body})


OpenDoor = Callable[..., Any]


@pytest.fixture
async def open_door(model_dir: Path, tokenizer: Tokenizer) -> AsyncIterator[OpenDoor]:
    """Return a coroutine that starts a frontend with the given settings and returns its Door."""
    async with AsyncExitStack() as stack:

        async def start(num_routers: int = 1, **settings: Any) -> Door:
            """Of several routers the directory tells; a single one is known, and not in the directory."""
            hub = InprocHub()

            async def node(name: str) -> Node:
                made = Node(name, endpoint=f"inproc://{name}", transport=hub.transport())
                return await stack.enter_async_context(made)

            control, other = await node("control"), await node("other")
            directory = settings.pop("directory", Directory() if num_routers > 1 else None)
            address = None if directory is None else (await start_actor(other, "directory", directory)).address
            routers = [ScriptedRouter(tokenizer) for _ in range(num_routers)]
            if num_routers == 1:
                settings["router"] = (await start_actor(await node("router"), "router", routers[0])).address
            else:
                for index, router in enumerate(routers):
                    place = await node(f"router-{index}")
                    await start_actor(place, f"router-{index}", router, directory=place.ref(address))
                    stack.push_async_callback(stop_actor, router)
            settings.setdefault("models", {"tiny": ServedModel(str(model_dir), MAX_MODEL_LEN)})
            frontend = Frontend(Frontend.Config(port=0, grace_s=1, **settings))
            known = None if address is None else control.ref(address)
            await start_actor(control, "frontend", frontend, directory=known)
            stack.push_async_callback(stop_actor, frontend)
            http = await stack.enter_async_context(httpx.AsyncClient(base_url=frontend.url, timeout=20))
            door = Door(frontend, routers, http)
            num_asked = len(settings.get("routers", routers))
            if num_routers > 1:
                async with asyncio.timeout(10):
                    await frontend._view.wait_for(lambda _: len(frontend._routers.there()) == num_asked)
            stack.push_async_callback(door.openai.close)
            return door

        yield start


@pytest.fixture
async def door(open_door: OpenDoor) -> Door:
    return await open_door()


@pytest.fixture
async def open_doors(model_dir: Path, tokenizer: Tokenizer, tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Return a coroutine that starts several frontends at one port, before one router, and returns a Door for each."""
    async with AsyncExitStack() as stack:

        async def start(count: int, *, grace_s: int = 1, **settings: Any) -> list[Door]:
            hub = InprocHub()

            async def node(name: str) -> Node:
                made = Node(name, endpoint=f"inproc://{name}", transport=hub.transport())
                return await stack.enter_async_context(made)

            async def add(name: str, actor: Actor) -> None:
                place = await node(name)
                await start_actor(place, name, actor, directory=place.ref(directory))
                stack.push_async_callback(stop_actor, actor)

            directory = (await start_actor(await node("directory"), "directory", Directory())).address
            router = ScriptedRouter(tokenizer)
            await add("main", router)
            listener = stack.enter_context(bind("127.0.0.1", 0))
            names = tuple(f"frontend-{index}" for index in range(count))
            models, doors = {"tiny": ServedModel(str(model_dir), MAX_MODEL_LEN)}, []
            for name in names:
                shared = SharedPort(os.dup(listener.fileno()), names, str(tmp_path))
                config = Frontend.Config(name=name, grace_s=grace_s, models=models, shared=shared, **settings)
                frontend = Frontend(config)
                await add(name, frontend)
                http = await stack.enter_async_context(httpx.AsyncClient(base_url=frontend.url, timeout=20))
                doors.append(Door(frontend, [router], http))
            listener.close()  # As the launcher does before it ends them.
            for door in doors:
                stack.push_async_callback(door.openai.close)
                known = door.frontend._view
                await known.wait_for(lambda view: sum(entry.kind == "frontend" for entry in view.entries) == count)
                await known.wait_for(lambda view: any(entry.kind == "router" for entry in view.entries))
            return doors

        yield start
