"""Clients of the frontend's endpoints without HTTP: JSON goes in, events come out, and the text is checked to the end.

What is between them and the router is the production code: the endpoints of ``actors/frontend`` with their outbox,
detokenisation, stop strings and choices. The tokenizer is small and nasty: six tokens in ten begin or end inside a
character.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random
from typing import Any

import msgspec
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers

from callboard.actors.engine.simulated import Simulation, simulated_tokens
from callboard.actors.frontend.answer import Backend
from callboard.actors.frontend.chat_template import ChatTemplate
from callboard.actors.frontend.endpoint import Endpoint
from callboard.actors.frontend.observed import RequestMetrics
from callboard.actors.frontend.prompts import Model
from callboard.actors.frontend.requests import decode_chat, decode_completion
from callboard.actors.frontend.responses import ChatShape, CompletionShape
from callboard.actors.frontend.routers import Routers
from callboard.actors.frontend.tokenizer import Tokenizer, _byte_alphabet
from callboard.actors.protocol import SamplingParams
from callboard.bus import Node, Ref

TIMEOUT_S = 100.0
LEADS = (b"\xc3", b"\xe2\x82", b"\xf0\x9f\x91")
"""Beginnings of characters that any continuation byte completes."""
TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}"
BYTES_FROM = 600
"""In a large vocabulary the ids from here on are single bytes, so that any text can be encoded."""
MAY_FAIL = (429, 503, 504)
"""What faults may cause. Anything else a client is told is a bug: its request was a good one."""


def token_data(id: int, vocab_size: int) -> bytes:
    """Return the bytes of a token: a word, or one with the beginning or the end of a character."""
    if vocab_size >= BYTES_FROM + 256 and BYTES_FROM <= id < BYTES_FROM + 256:
        return bytes([id - BYTES_FROM])
    mark = _letters(id).encode()
    kind = id % 10
    if kind < 3:
        return mark + LEADS[kind]
    if kind < 6:
        return bytes([0x80 + id * 7 % 64]) + mark
    return b" " + mark


@lru_cache
def tokenizer_of(vocab_size: int, eos_token_id: int | None) -> Tokenizer:
    """Return a byte-level tokenizer of so many ids, the last of them special."""
    of_byte = {byte: character for character, byte in _byte_alphabet().items()}
    vocab = {"".join(of_byte[byte] for byte in token_data(id, vocab_size)): id for id in range(vocab_size - 1)}
    assert len(vocab) == vocab_size - 1
    rust = RustTokenizer(models.BPE(vocab={**vocab, "<end>": vocab_size - 1}, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens(["<end>"])
    return Tokenizer(
        rust,
        special_tokens={},
        chat_template=ChatTemplate(TEMPLATE, {}, lambda: 0.0),
        eos_token_ids=() if eos_token_id is None else (eos_token_id,),
    )


@dataclass
class Answered:
    """What one client got. It is right if ``problems`` is empty."""

    request_id: str
    state: str = "waiting"
    """waiting, finished, failed (with an error that faults may cause) or left (the client did)"""
    error: str = ""
    texts: dict[int, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


@dataclass
class Expected:
    """What one choice must be."""

    text: str
    finish_reason: str
    tokens: list[int]
    is_cut: bool
    """A stop string ends it."""


class FrontendClient:
    """Makes requests at a node, as its frontend would take them in. ``routers`` are asked."""

    def __init__(
        self,
        node: Node,
        routers: Routers,
        simulation: Simulation,
        *,
        max_model_len: int,
        model: str = "tiny",
    ) -> None:
        self._simulation = simulation
        self._max_model_len = min(max_model_len, simulation.max_model_len)
        self._tokenizer = tokenizer_of(simulation.vocab_size, simulation.eos_token_id)
        served = Model(model, self._tokenizer, self._max_model_len, 0)
        metrics = RequestMetrics({model: served}, node.clock.now)
        self._backend = Backend(node, routers, {model: served}, TIMEOUT_S, 1 << 20, metrics)
        self._completions = Endpoint(self._backend, CompletionShape(), decode_completion, "completions")
        self._chats = Endpoint(self._backend, ChatShape(), decode_chat, "chat_completions")

    async def request(self, rng: Random, request_id: str) -> Answered:
        """Make one request drawn from ``rng``, and check what comes."""
        body, prompt = self._draw(rng)
        expected = [self._expect(body, prompt, index) for index in range(body.get("n", 1))]
        if rng.random() < 0.5:
            self._add_stop(rng, body, expected[0].text)
            expected = [self._expect(body, prompt, index) for index in range(body.get("n", 1))]
        leaves_after_s = rng.uniform(0.0, 0.4) if rng.random() < 0.15 else None
        client = _Client(Answered(request_id), body, expected, len(prompt), rng.choice([0.0, 0.0, 0.0, 0.02]))
        endpoint = self._chats if "messages" in body else self._completions
        await client.run(endpoint, leaves_after_s)
        if self._backend.outboxes.get(request_id) is not None or request_id in self._backend.in_flight:
            client.answered.problems.append("the frontend still counts it as under way")
        return client.answered

    def _draw(self, rng: Random) -> tuple[dict[str, Any], list[int]]:
        body: dict[str, Any] = {
            "model": next(iter(self._backend.models)),
            "max_tokens": rng.choice([1, 2, rng.randrange(1, 24)]),
            "n": rng.choice([1, 1, 2, 3]),
            "seed": rng.choice([0, -5, 2**62 + 3]),
            "temperature": rng.choice([0.0, 1.0]),
            "ignore_eos": rng.random() < 0.5,
            "return_token_ids": rng.random() < 0.5,
        }
        if rng.random() < 0.7:
            body |= {"stream": True, "stream_options": {"include_usage": rng.random() < 0.5}}
        if self._simulation.vocab_size >= BYTES_FROM + 256 and rng.random() < 0.3:
            body["messages"] = [{"role": "user", "content": "x" * rng.randrange(0, 30) + rng.choice(["", "é", "👍"])}]
            return body, self._tokenizer.encode_chat(body["messages"])
        # The same beginnings as other requests have: prefixes are matched.
        length = rng.choice([1, rng.randrange(1, 40)])
        body["prompt"] = [rng.randrange(3), *(10 + i % 30 for i in range(length - 1))]
        return body, list(body["prompt"])

    def _add_stop(self, rng: Random, body: dict[str, Any], text: str) -> None:
        """Stop where the answer will, at something in the middle of it, or nowhere."""
        stops = [" never"]
        if text:
            begin = rng.randrange(len(text))
            stops.append(text[begin : begin + rng.randrange(1, 6)])
        body["stop"] = rng.choice([stops[-1], stops])

    def _expect(self, body: dict[str, Any], prompt: list[int], index: int) -> Expected:
        sampling = SamplingParams(temperature=body["temperature"], seed=body["seed"] % 2**63, index=index)
        tokens = simulated_tokens(prompt, body["max_tokens"], self._simulation, sampling)
        shown, finish_reason, eos = tokens, "length", self._simulation.eos_token_id
        if eos in tokens and not body["ignore_eos"]:
            tokens = tokens[: tokens.index(eos) + 1]
            shown, finish_reason = tokens[:-1], "stop"
        size = self._simulation.vocab_size
        data = b"".join(token_data(id, size) for id in shown if id != size - 1)
        text = data.decode(errors="replace")
        stops = body.get("stop", [])
        stops = [stops] if isinstance(stops, str) else stops
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        if ends:
            return Expected(text[: min(ends)[1]], "stop", tokens, True)
        return Expected(text, finish_reason, tokens, False)


class _Client:
    """One request's ASGI side."""

    def __init__(
        self, answered: Answered, body: dict[str, Any], expected: list[Expected], num_prompt: int, seconds: float
    ) -> None:
        self.answered = answered
        self._body = body
        self._expected = expected
        self._num_prompt = num_prompt
        self._seconds_per_write = seconds
        self._status: int | None = None
        self._data = b""
        self._is_over = False
        self._ids: dict[int, list[int]] = {}
        self._ends: dict[int, str] = {}
        self._leaves = asyncio.Event()
        self._has_left = False

    async def run(self, endpoint: Endpoint, leaves_after_s: float | None) -> None:
        headers = [(b"x-request-id", self.answered.request_id.encode())]
        requests = [{"type": "http.request", "body": msgspec.json.encode(self._body)}]
        timer = None
        if leaves_after_s is not None:
            timer = asyncio.get_running_loop().call_later(leaves_after_s, self._leave)

        async def receive() -> Any:
            if requests:
                return requests.pop()
            await self._leaves.wait()
            return {"type": "http.disconnect"}

        try:
            await endpoint({"method": "POST", "path": "/", "headers": headers}, receive, self._send)
        finally:
            if timer is not None:
                timer.cancel()
        self._conclude()

    def _leave(self) -> None:
        self._has_left = True
        self._leaves.set()

    async def _send(self, event: Any) -> None:
        if self._seconds_per_write:
            await asyncio.sleep(self._seconds_per_write)
        if self._is_over:
            self._wrong("something was written after the end")
        if event["type"] == "http.response.start":
            if self._status is not None:
                self._wrong("its answer began twice")
            self._status = event["status"]
            return
        self._data += event["body"]
        self._is_over = not event.get("more_body", False)

    # ---- checks --------------------------------------------------------------------------------------------------

    def _wrong(self, what: str) -> None:
        self.answered.problems.append(what)

    def _conclude(self) -> None:
        answered = self.answered
        if self._status is None:
            self._end_without_answer()
            return
        if not self._is_over and (self._status != 200 or not self._body.get("stream")):
            self._end_without_answer()  # Its body was cut off.
            return
        if self._status != 200:
            self._failed(msgspec.json.decode(self._data)["error"], self._status)
            return
        error = self._read_events() if self._body.get("stream") else self._read_whole()
        is_whole = error is None and self._is_over
        for index, expected in enumerate(self._expected):
            self._check(index, expected, is_whole=is_whole)
        if error is not None:
            self._failed(error, None)
        elif is_whole:
            answered.state = "finished"
        else:
            self._end_without_answer()

    def _end_without_answer(self) -> None:
        if self._has_left:
            self.answered.state = "left"
        else:
            self.answered.state = "failed"
            self._wrong("it ended without an end")

    def _failed(self, error: dict[str, Any], status: int | None) -> None:
        self.answered.state = "failed"
        self.answered.error = f"{error['code']}: {error['message']}"
        is_told = error["code"] in ("unavailable", "out_of_blocks", "queue_full", "timeout", "aborted", "shutting_down")
        if not is_told or status not in (None, *MAY_FAIL):
            self._wrong(f"no fault may cause {status} {error}")

    def _read_whole(self) -> None:
        answer = msgspec.json.decode(self._data)
        for choice in answer["choices"]:
            self._take(choice, choice["message"]["content"] if "message" in choice else choice["text"])
        self._check_usage(answer["usage"])

    def _read_events(self) -> dict[str, Any] | None:
        """Take the events in; return the error that ends them, if one does."""
        *events, rest = self._data.split(b"\n\n")
        if rest:
            self._wrong("half an event was written")
        num_done = 0
        for event in events:
            if num_done:
                self._wrong("an event came after [DONE]")
            payload = event.removeprefix(b"data: ")
            if payload == b"[DONE]":
                num_done += 1
                continue
            chunk = msgspec.json.decode(payload)
            if "error" in chunk:
                error: dict[str, Any] = chunk["error"]
                return error
            for choice in chunk["choices"]:
                self._take(choice, choice["delta"].get("content", "") if "delta" in choice else choice["text"])
            if not chunk["choices"]:
                self._check_usage(chunk["usage"])
        if self._is_over and num_done != 1:
            self._wrong("it is over without [DONE]")
        return None

    def _take(self, choice: dict[str, Any], text: str) -> None:
        index = choice["index"]
        if index in self._ends:
            self._wrong(f"choice {index} went on after its end")
        self.answered.texts[index] = self.answered.texts.get(index, "") + text
        self._ids.setdefault(index, []).extend(choice.get("token_ids") or ())
        if choice["finish_reason"] is not None:
            self._ends[index] = choice["finish_reason"]

    def _check(self, index: int, expected: Expected, *, is_whole: bool) -> None:
        text, ids = self.answered.texts.get(index, ""), self._ids.get(index, [])
        end = self._ends.get(index)
        if not expected.text.startswith(text):
            self._wrong(f"choice {index} is {text!r} and not {expected.text!r}")
        elif end is not None and text != expected.text:
            self._wrong(f"choice {index} ended after {text!r}, and should have been {expected.text!r}")
        if ids != expected.tokens[: len(ids)]:
            self._wrong(f"choice {index} has the tokens {ids} and not {expected.tokens}")
        if end is not None:
            if end != expected.finish_reason:
                self._wrong(f"choice {index} ended with {end} and not {expected.finish_reason}")
            if self._body["return_token_ids"] and not expected.is_cut and ids != expected.tokens:
                self._wrong(f"choice {index} ended with the tokens {ids} and not {expected.tokens}")
        elif is_whole:
            self._wrong(f"choice {index} has no end")

    def _check_usage(self, usage: dict[str, Any]) -> None:
        most = sum(len(expected.tokens) for expected in self._expected)
        is_cut = any(expected.is_cut for expected in self._expected)
        num_output = usage["completion_tokens"]
        if usage["prompt_tokens"] != self._num_prompt or not (num_output <= most if is_cut else num_output == most):
            self._wrong(f"its usage is {usage}, for {self._num_prompt} and {most} tokens")


async def frontend_request(
    node: Node, router: Callable[[], Ref], simulation: Simulation, rng: Random, *, request_id: str, max_model_len: int
) -> Answered:
    """Make one request, drawn from ``rng``, at the frontend of ``node``, and say what came of it.

    All draws are made before anything is awaited. ``max_model_len`` is the least of the engines'.
    """
    routers = Routers(node, only=router().address)
    return await FrontendClient(node, routers, simulation, max_model_len=max_model_len).request(rng, request_id)


def _letters(number: int) -> str:
    letters = ""
    while True:
        number, digit = divmod(number, 26)
        letters = chr(ord("a") + digit) + letters
        if not number:
            return letters
        number -= 1
