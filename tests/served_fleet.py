"""A fleet that ``callboard up`` has started: two simulated engines, and a model whose tokens are bytes."""

import json
import urllib.error
import urllib.request
from typing import Any

from byte_tokenizer import write_byte_tokenizer
from prometheus_client.parser import text_string_to_metric_families

FLEET = """\
name = "test"
[listen]
http = "127.0.0.1:0"
{listen}
[models.tiny]
path = "model"
[defaults.kv]
size = "1MiB"
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
        self.url: str = self.ps()["url"]

    def ps(self) -> dict[str, Any]:
        """What ``ps --json`` says."""
        [fleet] = json.loads(self.place.callboard("ps", "--json").stdout)
        return dict(fleet)

    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in self.ps()["actors"]}

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
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


def samples_of(text: str) -> Scraped:
    families = text_string_to_metric_families(text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(scraped: Scraped, name: str, **labels: str) -> float:
    """Return the one sample of that name whose labels are, or include, these. Raises ValueError if there are others."""
    wanted = frozenset(labels.items())
    [found] = [number for (each, known), number in scraped.items() if each == name and known >= wanted]
    return found
