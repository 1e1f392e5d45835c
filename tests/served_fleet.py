"""A fleet that ``callboard up`` has started: two simulated engines, and a model whose tokens are bytes."""

import copy
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec
from byte_tokenizer import write_byte_tokenizer
from prometheus_client.parser import text_string_to_metric_families
from waiting import PATIENCE_S

from callboard.tools.ps import look_at
from callboard.tools.running import RunningFleet, read_state

FLEET = """\
name = "test"
[listen]
http = "127.0.0.1:0"
{listen}
[models.tiny]
path = "model"
[defaults.kv]
size = "16MiB"
[[engine]]
name = "prefill"
roles = ["prefill"]
runner = "simulated"
device = "cpu:0"
restart = {{ backoff = "50ms" }}
[[engine]]
name = "decode"
roles = ["decode"]
runner = "simulated"
device = "cpu:1"
restart = {{ backoff = "50ms" }}
{more}
"""
BLOCK_SIZE = 16
BETWEEN_REPORTS_S = 0.4
T = TypeVar("T")
Scraped = dict[tuple[str, frozenset[tuple[str, str]]], float]


class ServedFleet:
    """A fleet at ``url``, of a Place (tests/tools/conftest.py)."""

    def __init__(self, place: Any, *, listen: str = "", more: str = "") -> None:
        self.place = place
        folder = place.model(vocab_size=256)
        (folder / "model.safetensors").unlink()
        write_byte_tokenizer(folder)
        up = place.callboard("up", str(place.write(FLEET.format(listen=listen, more=more))), "--detach")
        assert up.returncode == 0, up.stderr
        self.url: str = state_of(place).state.url or ""

    def seen_from(self, folder: Path) -> Self:
        """Return the same fleet, seen from another folder."""
        made = copy.copy(self)
        made.place = self.place.seen_from(folder)
        return made

    def rows(self) -> dict[str, dict[str, Any]]:
        """What ``ps --json`` says of each actor."""
        return rows_of(self.place)

    def settled_rows(self) -> dict[str, dict[str, Any]]:
        """Return ``rows`` once they tell of all that was asked before: nothing has changed between two reports."""
        counted: list[Any] = [None, None]
        while counted[-1] is None or counted[-1] != counted[-2]:
            time.sleep(BETWEEN_REPORTS_S)
            rows = self.rows()
            names = ("name", "counters", "num_running", "cached_blocks")
            counted.append([[row[name] for name in names] for row in rows.values()])
        return rows

    def pids(self) -> dict[str, int]:
        """The processes of its nodes, as the launcher knows them."""
        return {node.name: node.pid for node in state_of(self.place).state.nodes}

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        """Return the status and the body of a page."""
        return self._answer(urllib.request.Request(self.url + path, headers=headers))

    def complete(self, prompt: str, *, max_tokens: int = 8, request_id: str = "", key: str = "") -> tuple[int, str]:
        """Return the status and the body of a completion."""
        body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}
        headers = {"content-type": "application/json", "authorization": f"Bearer {key}", "x-request-id": request_id}
        return self._answer(
            urllib.request.Request(f"{self.url}/v1/completions", json.dumps(body).encode(), headers=headers)
        )

    def scrape(self) -> Scraped:
        """Return every sample of /metrics, by name and labels."""
        status, text = self.get("/metrics")
        assert status == 200
        return samples_of(text)

    def _answer(self, request: urllib.request.Request) -> tuple[int, str]:
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
                request, timeout=PATIENCE_S
            ) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


def state_of(place: Any) -> RunningFleet:
    """Return the fleet "test" of a place. Raises AssertionError if it does not run."""
    folder = place.runtime / "callboard" / "test"
    state = read_state(folder)
    assert state is not None, "the fleet has ended"
    return RunningFleet(folder, state)


def in_a_thread(work: Callable[[], T]) -> T:
    """Return what a command's code gives that runs a loop of its own, whether or not one runs here."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


def rows_of(place: Any) -> dict[str, dict[str, Any]]:
    """Return what ``ps --json`` says of each actor of the fleet "test", without starting a process for it."""
    found = in_a_thread(lambda: look_at(state_of(place)))
    return {row["name"]: row for row in msgspec.to_builtins(found)["actors"]}


def samples_of(text: str) -> Scraped:
    families = text_string_to_metric_families(text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def requests_by_frontend(scraped: Scraped) -> dict[str, float]:
    """Return how many requests each of several frontends has counted."""
    found: dict[str, float] = {}
    for (name, labels), number in scraped.items():
        if name == "callboard_requests_total":
            frontend = dict(labels)["frontend"]
            found[frontend] = found.get(frontend, 0.0) + number
    return found


def value(scraped: Scraped, name: str, **labels: str) -> float:
    """Return the one sample of that name whose labels are, or include, these. Raises ValueError if there are others."""
    wanted = frozenset(labels.items())
    [found] = [number for (each, known), number in scraped.items() if each == name and known >= wanted]
    return found
