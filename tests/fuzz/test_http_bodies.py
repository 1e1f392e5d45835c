"""Bodies that are wrong in every way, at the HTTP door: whatever is not taken is the client's fault."""

import json
import random
from typing import Any

import pytest
from fuzz.mutator import Mutator

from callboard.actors.frontend.errors import ApiError
from callboard.actors.frontend.microserving_asks import PrepRecvRequest, RemoteSendRequest
from callboard.actors.frontend.microserving_door import EngineRequest
from callboard.actors.frontend.microserving_generation import StartGenerateRequest
from callboard.actors.frontend.microserving_held import Held, HeldReservations, NotAName
from callboard.actors.frontend.requests import decode_chat, decode_completion, decoding
from callboard.actors.protocol import KvAddr
from callboard.bus import Address
from callboard.kv.layout import KvLayout

COMMON = {
    "model": "m",
    "max_tokens": 5,
    "n": 2,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 4,
    "seed": 7,
    "stop": ["a", "b"],
    "stream": True,
    "stream_options": {"include_usage": True},
    "user": "u",
}
CHAT = COMMON | {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "logprobs": True}
COMPLETION = COMMON | {"prompt": ["x", "y"], "echo": False, "logprobs": 1}
ODD = [
    None,
    True,
    0,
    -1,
    2**31,
    2**63,
    2**64,
    10**30,
    1e308,
    1e-320,
    float("nan"),
    float("inf"),
    "",
    "\0",
    "\ud800",
    "x" * 9999,
]
ODD += [[], {}, [[]], [1, "a"], [[1], ["a"]], {"a": {}}, [None] * 200, [[2**40]], "é\U0001f600", ["\ud800"]]
NUM_BODIES = 10_000


def mutated(rng: random.Random, value: Any) -> Any:
    """Return a value with one part of it changed."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        chance = rng.random()
        if chance < 0.1:
            return {name: part for name, part in value.items() if name != key}
        if chance < 0.15:
            return value | {rng.choice(list(COMMON)): rng.choice(ODD)}
        return value | {key: mutated(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], mutated(rng, value[at]), *value[at + rng.choice((0, 1)) :]]
    return rng.choice(ODD)


@pytest.mark.parametrize(("kind", "body"), [("chat", CHAT), ("completion", COMPLETION)])
def test_a_body_is_taken_or_the_clients_fault(kind: str, body: dict[str, Any]) -> None:
    rng = random.Random(kind)
    flip = Mutator(rng, {"Pong": [("", b"\x91\x0c")]}).flip
    num_taken = 0
    statuses: set[int] = set()
    for number in range(NUM_BODIES):
        data = json.dumps(mutated(rng, body)).encode()
        if number % 3 == 0:
            data = flip(data)
        try:
            if kind == "chat":
                chat = decode_chat(data)
                chat.conversation()
                chat.sampling(max_tokens=1, seed=1, index=0, eos_token_ids=(1,))
            else:
                completion = decode_completion(data)
                assert completion.prompts
                completion.sampling(max_tokens=1, seed=1, index=0, eos_token_ids=(1,))
            num_taken += 1
        except ApiError as error:
            statuses.add(error.status)
    assert all(400 <= status < 500 for status in statuses)
    assert NUM_BODIES // 20 < num_taken < NUM_BODIES // 2


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (PrepRecvRequest, {"end": -1}),
        (RemoteSendRequest, {"begin": 0, "end": -1, "kv_addr_info": "x", "recv_rank": 0}),
        (StartGenerateRequest, {"begin": -1}),
    ],
)
def test_a_body_for_an_engine_is_taken_or_the_clients_fault(kind: type[EngineRequest], more: dict[str, Any]) -> None:
    rng, decode = random.Random(kind.__name__), decoding(kind)
    num_taken = 0
    statuses: set[int] = set()
    for _ in range(NUM_BODIES // 5):
        try:
            request = decode(json.dumps(mutated(rng, COMPLETION | more)).encode())
            request.sampling(max_tokens=1, seed=1, index=0, eos_token_ids=(1,))
            num_taken += 1
        except ApiError as error:
            statuses.add(error.status)
    assert all(400 <= status < 500 for status in statuses)
    assert NUM_BODIES // 100 < num_taken < NUM_BODIES // 6


def test_a_name_that_was_tampered_with_names_nothing() -> None:
    rng, known = random.Random(1), HeldReservations()
    layout = KvLayout(2, 2, 16)
    for number in range(4):
        kv = KvAddr(Address("kv", "ipc://kv", "kv"), "epoch", f"id{number}", layout, 0, 9, ())
        known.put(Held("e", f"u{number}", b"", 9, 1, kv, 0.0))
    names = [held.name for held in known._by_id.values()]
    assert [known.named(name) for name in names] == list(known._by_id.values())
    for _ in range(NUM_BODIES):
        letters = list(rng.choice(names))
        for _ in range(rng.randrange(1, 4)):
            letters[rng.randrange(len(letters))] = rng.choice("AZaz09-_=+/\0 \u00e9\ud800")
        tampered = "".join(letters)
        try:
            found = known.named(tampered)
        except NotAName:
            continue
        assert found is None or found.name in names
