"""A fleet of processes with a real tiny model, as ``callboard up`` starts it, and clients that keep it busy."""

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from byte_tokenizer import write_byte_tokenizer
from oracle import assert_tokens_pass_oracle
from tiny_models import save_tiny_model
from transformers import PreTrainedModel
from waiting import PATIENCE_S

from callboard.actors.protocol import GetKvStats, SamplingParams
from callboard.tools.bus_client import ask, list_entries
from callboard.tools.running import RunningFleet, read_state

NAME = "survival"
VOCAB = 256
"""Clients' token ids: those of the tokenizer; the model has more."""
FLEET = """\
name = "survival"
[listen]
http = "127.0.0.1:0"
[models.tiny]
path = {path}
[defaults.kv]
size = "8MiB"
restart = {{ backoff = "50ms", max = 1000 }}
{engines}
"""
ENGINE = """\
[[engine]]
name = "{name}"
model = "tiny"
roles = [{roles}]
device = "{device}"
max_num_batched_tokens = 64
restart = {{ backoff = "50ms", max = 1000 }}
"""


@dataclass
class Answer:
    """One streamed request: what was asked, what came, and when."""

    id: str
    prompt: list[int]
    sampling: SamplingParams
    asked_s: float
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """When each chunk with tokens came."""
    finish_reason: str | None = None
    error: str = ""
    ended_s: float = 0.0

    def gap_around(self, moment: float) -> float | None:
        """Return the longest time without a token that began about a moment; None if no token had come by then."""
        if not self.times or not self.times[0] <= moment <= self.ended_s:
            return None
        began = zip(self.times, [*self.times[1:], self.ended_s], strict=True)
        return max(
            (after - before for before, after in began if after > moment and before < moment + 0.2), default=None
        )

    @property
    def gaps(self) -> list[float]:
        """Seconds between chunks."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


class Served:
    """The running fleet. ``client`` asks it over HTTP as fast as ``num_streams`` clients can."""

    def __init__(self, folder: Path, running: RunningFleet, url: str) -> None:
        self.folder = folder
        self.running = running
        self.url = url
        self.answers: list[Answer] = []
        self.seen: dict[str, dict[str, str]] = {}
        """The states of processes and actors, as they were looked at last."""

    def pid(self, node: str) -> int:
        """Return the pid of a node's process now, 0 while there is none."""
        state = read_state(self.running.folder)
        assert state is not None, "the fleet has ended"
        return next((each.pid for each in state.nodes if each.name == node), 0)

    def _are_ready(self, names: tuple[str, ...]) -> bool:
        """Say whether the directory shows all of them ready, in processes that have started."""
        state = read_state(self.running.folder)
        assert state is not None, "the fleet has ended"
        nodes = {node.name: node.state for node in state.nodes}
        entries = {entry.name: entry for entry in list_entries(self.running)}
        self.seen = {"processes": nodes, "actors": {entry.name: entry.state for entry in entries.values()}}
        return all(name in entries and entries[name].state == "ready" and nodes[name] == "ready" for name in names)

    async def until_ready(self, *names: str) -> None:
        """Wait until all these engines and KV managers are ready."""
        ends = time.monotonic() + PATIENCE_S
        while not await asyncio.to_thread(self._are_ready, names):
            assert time.monotonic() < ends, f"not all of {names} came back: {self.seen}"
            await asyncio.sleep(0.05)

    async def ask(self, http: httpx.AsyncClient, answer: Answer) -> Answer:
        """Stream one completion and note what comes."""
        sampling = answer.sampling
        body: dict[str, Any] = {
            "model": "tiny",
            "prompt": answer.prompt,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        try:
            url, headers = f"{self.url}/v1/completions", {"x-request-id": answer.id}
            async with http.stream("POST", url, json=body, headers=headers) as response:
                if response.status_code != 200:
                    answer.error = f"{response.status_code} {(await response.aread()).decode()}"
                    return answer
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        _note(answer, json.loads(line[6:]))
        except httpx.HTTPError as error:
            answer.error = repr(error)
        finally:
            answer.ended_s = time.monotonic()
        return answer

    async def keep_busy(self, num_streams: int, stop: asyncio.Event, *, seed: int = 1) -> None:
        """Ask ``num_streams`` requests at a time, until told to stop; wait for the last of them."""
        limits = httpx.Limits(max_connections=num_streams)
        async with httpx.AsyncClient(timeout=2 * PATIENCE_S, limits=limits, trust_env=False) as http:

            async def client(number: int) -> None:
                rng = random.Random(f"{seed}/{number}")
                while not stop.is_set():
                    answer = _random_request(rng, f"r{len(self.answers)}")
                    self.answers.append(answer)
                    await self.ask(http, answer)

            await asyncio.gather(*(client(number) for number in range(num_streams)))

    def assert_answers_pass_oracle(self, model: PreTrainedModel) -> None:
        """Check that every request has ended, with each of its tokens once, and the right ones."""
        assert self.answers
        for answer in self.answers:
            assert not answer.error, f"{answer.id} after {len(answer.tokens)} tokens: {answer.error}"
            assert (answer.finish_reason, len(answer.tokens)) == ("length", answer.sampling.max_tokens), answer.id
            assert_tokens_pass_oracle(model, answer.prompt, answer.tokens, answer.sampling)

    async def assert_all_free(self) -> None:
        """Wait until every block of every pool is free or cached, and nothing is reserved."""
        async with asyncio.timeout(PATIENCE_S):
            while not await asyncio.to_thread(self._is_all_free):
                await asyncio.sleep(0.05)

    def _is_all_free(self) -> bool:
        entries = [entry for entry in list_entries(self.running) if entry.kind == "kv_manager"]
        assert entries
        found = [ask(self.running, entry.address, GetKvStats(recall=True), timeout=PATIENCE_S) for entry in entries]
        assert not [stats.problems for stats in found if stats.problems]
        return all(each.free + each.cached == each.num_blocks and not each.num_reservations for each in found)


def _random_request(rng: random.Random, name: str) -> Answer:
    sampling = SamplingParams(
        max_tokens=rng.randrange(20, 60),
        temperature=rng.choice((0.0, 0.8)),
        top_p=rng.choice((1.0, 0.9)),
        seed=rng.randrange(1000),
        ignore_eos=True,
        presence_penalty=rng.choice((0.0, 1.0)),
        frequency_penalty=rng.choice((0.0, 0.5)),
    )
    prompt = [rng.randrange(VOCAB) for _ in range(rng.randrange(5, 150))]
    return Answer(name, prompt, sampling, time.monotonic())


def _note(answer: Answer, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        answer.error = str(chunk["error"])
    for choice in chunk.get("choices", ()):
        if choice.get("token_ids"):
            answer.tokens += choice["token_ids"]
            answer.times.append(time.monotonic())
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason


@contextmanager
def served(folder: Path, engines: dict[str, tuple[str, str]], *, script: str, more: str = "") -> Iterator[Served]:
    """Give a running fleet; ``engines`` have a role ("" for all) and a device each. It is down at the end."""
    path = save_tiny_model("llama3", folder)
    write_byte_tokenizer(path)
    shown = [
        ENGINE.format(name=name, roles=f'"{role}"' if role else "", device=device)
        for name, (role, device) in engines.items()
    ]
    text = FLEET.format(path=json.dumps(str(path)), engines="\n".join(shown))
    # A busy machine may take long to start an engine.
    text += f'[[router]]\nname = "main"\nscript = "{script}"\npatience = "{PATIENCE_S}s"\n{more}'
    (folder / "fleet.toml").write_text(text)
    runtime = folder / "run"
    runtime.mkdir(mode=0o700)
    variables = {key: value for key, value in os.environ.items() if not key.startswith("XDG_")}
    variables |= {"XDG_RUNTIME_DIR": str(runtime), "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}

    def callboard(*words: str) -> None:
        command = [sys.executable, "-P", "-m", "callboard.tools.cli", *words]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr

    callboard("up", str(folder / "fleet.toml"), "--detach")
    try:
        place = runtime / "callboard" / NAME
        state = read_state(place)
        assert state is not None
        yield Served(place, RunningFleet(place, state), state.url or "")
    finally:
        callboard("down", NAME)


def quantile(values: list[float], share: float) -> float:
    """Return the value below which that share of them lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
