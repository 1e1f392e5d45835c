"""drain, role, add and restart: a fleet of processes changes while eight clients read their streams."""

import json
import os
import signal
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from byte_tokenizer import write_byte_tokenizer
from served_fleet import rows_of, state_of
from waiting import PATIENCE_S, wait_until

from callboard.actors.engine.simulated import Simulation, simulated_tokens
from callboard.tools.launcher_calls import SOCKET

FLEET = """\
name = "test"
[listen]
http = "127.0.0.1:0"
[models.tiny]
path = "model"
[defaults.kv]
size = "96MiB"
[[engine]]
name = "prefill"
roles = ["prefill"]
runner = "simulated"
device = "cpu:0"
[[engine]]
name = "decode"
roles = ["decode"]
runner = "simulated"
device = "cpu:1"
restart = { backoff = "50ms" }
"""
NUM_LAYERS = 24
"""As many as it takes for a step to last some milliseconds."""
NUM_STREAMS = 8
NUM_TOKENS = 300
MANY_TOKENS = 1900
"""More than are generated in the time that a command takes."""
SIMULATION = Simulation(num_layers=NUM_LAYERS, vocab_size=256)


class Reading:
    """A client that reads a stream, with the times of its tokens."""

    def __init__(self, url: str, number: int, num_tokens: int) -> None:
        self.prompt = [(number * 37 + 11 * k) % 256 for k in range(40 + 9 * number)]
        self.tokens: list[int] = []
        self.finish_reason = ""
        self.error = ""
        self.times: list[float] = []
        self.leaves = False
        self.num_tokens = num_tokens
        body = {"model": "tiny", "prompt": self.prompt, "max_tokens": num_tokens, "temperature": 0}
        body |= {"stream": True, "ignore_eos": True, "return_token_ids": True}
        headers = {"content-type": "application/json"}
        self._request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)

    def read(self) -> None:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self._request, timeout=PATIENCE_S) as lines:
            for line in lines:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                self.error = self.error or str(event.get("error", ""))
                for choice in event.get("choices", ()):
                    self.tokens += choice.get("token_ids") or []
                    self.finish_reason = choice.get("finish_reason") or self.finish_reason
                self.times.append(time.perf_counter())
                if self.leaves:
                    return

    def longest_gap(self) -> tuple[float, float]:
        """Return the longest time between two events, and the median of all."""
        gaps = sorted(after - before for before, after in zip(self.times, self.times[1:], strict=False))
        return gaps[-1], gaps[len(gaps) // 2]

    def assert_is_right(self) -> None:
        assert not self.error
        assert self.finish_reason == ("" if self.leaves else "length")
        num_tokens = len(self.tokens) if self.leaves else self.num_tokens
        assert self.tokens == simulated_tokens(self.prompt, num_tokens, SIMULATION)


class Service:
    """A fleet, the commands that change it, and the streams that go on meanwhile."""

    def __init__(self, place: Any) -> None:
        self.place = place
        folder = place.model(vocab_size=256, num_hidden_layers=NUM_LAYERS, max_position_embeddings=2048)
        (folder / "model.safetensors").unlink()
        write_byte_tokenizer(folder)
        up = place.callboard("up", str(place.write(FLEET)), "--detach")
        assert up.returncode == 0, up.stderr
        self.url: str = state_of(place).state.url or ""

    def __call__(self, *words: str, code: int = 0) -> str:
        """Run a command; return what it prints."""
        done = self.place.run(*words)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def rows(self) -> dict[str, dict[str, Any]]:
        return rows_of(self.place)

    def read_streams(
        self, pool: ThreadPoolExecutor, num_streams: int = NUM_STREAMS, num_tokens: int = NUM_TOKENS
    ) -> list[tuple[Reading, "Future[None]"]]:
        """Begin streams; return once each has brought a token."""
        readings = [Reading(self.url, number, num_tokens) for number in range(num_streams)]
        streams = [(reading, pool.submit(reading.read)) for reading in readings]
        wait_until(lambda: all(reading.tokens or future.done() for reading, future in streams))
        return streams


@pytest.fixture(scope="module")
def service(place_of_module: Any) -> Service:
    return Service(place_of_module)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(NUM_STREAMS) as made:
        yield made


def test_names_that_are_none_are_told_the_nearest_one(service: Service) -> None:
    wrong = {
        ("drain", "decod"): 'fleet "test" has no engine "decod": did you mean "decode"?',
        ("drain", "kv-cpu1"): '"kv-cpu1" is no engine, but a kv manager: its engines are decode, prefill',
        ("role", "decoder", "prefill"): 'fleet "test" has no engine "decoder": did you mean "decode"?',
        ("role", "decode", "prefil"): 'there is no role "prefil": did you mean "prefill"?',
        ("role", "decode", "a b"): '"a b" is no role',
        ("restart", "prefll"): 'fleet "test" has no engine "prefll": did you mean "prefill"?',
        ("restart", "kv-cpu", "--now"): 'there is no "kv-cpu" here: did you mean "kv-cpu1"?',
        ("restart", "kv-cpu1"): "kv-cpu1 is a KV manager, and its cache would be lost: restart it with --now",
        ("restart", "main"): "main is a router, which is not drained: restart it with --now",
        ("restart", "frontend"): "frontend is the only frontend, in the control process",
        ("restart", "control", "--now"): 'without "control" there is no fleet',
        ("add", "engine", "--like", "decod"): 'there is no engine "decod" to be like: did you mean "decode"?',
        ("add", "engine", "--like", "decode", "--name", "prefill"): 'the fleet has a "prefill" already',
        ("add", "engine", "--like", "decode", "--name", "a b"): '"a b" is no name',
        ("add", "engine", "--like", "decode", "--count", "0"): "--count 0: give 1 to 64",
        ("add", "engine", "--like", "decode", "--device", "gpu"): '"gpu" is no device',
        ("add", "engine", "--like", "decode", "--name", "x", "--count", "2"): "--name is for one engine",
    }
    for words, sentence in wrong.items():
        said = service(*words, code=2)
        assert sentence in said
        assert said.count("\n") == 1, said
    assert set(service.rows()) == {"decode", "frontend", "kv-cpu0", "kv-cpu1", "main", "prefill"}


def test_an_engine_is_added_while_the_fleet_serves(service: Service, pool: ThreadPoolExecutor) -> None:
    ((reading, future),) = service.read_streams(pool, 1)
    said = service("add", "engine", "--like", "decode")
    assert "decode-1 serves tiny on cpu:2, for decode, with kv-cpu2." in said
    rows = service.rows()
    assert {"decode-1", "kv-cpu2"} <= set(rows)
    assert rows["decode-1"]["state"] == "ready"
    future.result()
    reading.assert_is_right()


def test_a_drain_under_load_ends_no_request(service: Service, pool: ThreadPoolExecutor, record_property: Any) -> None:
    streams = service.read_streams(pool)
    outcome = json.loads(service("drain", "decode", "--json").splitlines()[0])
    rows = service.rows()
    for reading, future in streams:
        future.result()
        reading.assert_is_right()
    assert rows["decode"]["state"] == "draining"
    assert rows["decode-1"]["state"] == "ready"
    assert outcome["num_failed"] == 0
    assert outcome["num_moved"] > 0, "all had finished before they could be moved"
    assert outcome["num_bytes"] > 0
    assert len(outcome["moves"]) == outcome["num_moved"]
    # Said, and not asserted on: how long a stream stood still is the machine's affair.
    pauses = [f"{pause:.1f}" for pause in outcome["pauses_itl"]]
    gaps = [f"{gap / median:.1f}" for gap, median in (reading.longest_gap() for reading, _ in streams)]
    record_property("pauses in times between tokens, at the router", " ".join(pauses))
    record_property("longest gaps in median ones, at the client", " ".join(gaps))
    print(f"moved {outcome['num_moved']}, {outcome['num_bytes']} bytes; pauses {pauses}; at the clients {gaps}")


def test_an_engine_is_restarted_without_a_word_to_the_clients(service: Service, pool: ThreadPoolExecutor) -> None:
    service("drain", "decode", "--undo")
    before = {node.name: node.pid for node in state_of(service.place).state.nodes}
    streams = service.read_streams(pool)
    said = service("restart", "decode")
    assert "decode was restarted, and serves again." in said
    after = {node.name: node.pid for node in state_of(service.place).state.nodes}
    assert {name for name in before if before[name] != after[name]} == {"decode"}
    for reading, future in streams:
        future.result()
        reading.assert_is_right()
    wait_until(lambda: service.rows().get("decode", {}).get("state") == "ready")


def test_roles_and_draining_outlive_a_crash(service: Service) -> None:
    said = service("role", "decode-1", "prefill")
    assert "decode-1 is for prefill now; it was for decode." in said
    assert "drains" in service("drain", "decode-1", "--no-wait")
    pid = service.rows()["decode-1"]["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: service.rows()["decode-1"]["pid"] not in (0, pid))
    wait_until(lambda: service.rows()["decode-1"]["state"] in ("ready", "draining"))
    row = service.rows()["decode-1"]
    assert (row["roles"], row["state"]) == (("prefill",), "draining")
    service("drain", "decode-1", "--undo")
    service("role", "decode-1", "decode")


def test_who_leaves_a_drain_is_told_that_it_goes_on(service: Service, pool: ThreadPoolExecutor) -> None:
    service("drain", "decode-1", "--no-wait")
    streams = service.read_streams(pool, 1, MANY_TOKENS)  # At decode, and nobody to hand it over to.
    leaving = service.place.start("drain", "decode")
    wait_until(lambda: service.rows()["decode"]["state"] == "draining")
    assert any("nobody to hand them over to" in line for line in leaving.stderr)
    leaving.send_signal(signal.SIGINT)
    out, errors = leaving.communicate(timeout=PATIENCE_S)
    assert "decode goes on draining" in out
    assert "Traceback" not in errors
    assert leaving.returncode == 130
    assert service.rows()["decode"]["state"] == "draining"
    for reading, future in streams:
        reading.leaves = True
        future.result()
        reading.assert_is_right()
    service("drain", "decode", "--undo")
    service("drain", "decode-1", "--undo")


def test_what_was_added_ends_with_the_fleet(service: Service) -> None:
    assert (service.place.runtime / "callboard" / "test" / SOCKET).exists()
    done = service.place.callboard("down", "test")
    assert done.returncode == 0, done.stderr
    wait_until(service.place.is_empty)
