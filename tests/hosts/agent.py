"""A client that lives on one of the hosts: it is told what to ask, as lines of JSON, and tells what came of it.

Asks run side by side. ``{"id", "kind", ...}`` is answered by lines with the same id: for a completion one when the
first token has come, and one at its end; for everything else one.
"""

import asyncio
import http.client
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

from callboard.actors.protocol import GetKvStats
from callboard.bus import BusError, Node
from callboard.tools.bus_client import list_entries, visitor
from callboard.tools.running import find_fleet

FLEET = "demo"


def tell(**line: Any) -> None:
    """Write a line, as a whole: threads tell, too."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def complete(id: int, port: int, prompt: list[int], max_tokens: int, request_id: str) -> None:
    """Stream a completion; its end has all tokens, or the error."""
    begun, tokens, error = time.monotonic(), [], ""
    body = {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
        "temperature": 0,
    }
    headers = {"content-type": "application/json", "x-request-id": request_id}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/v1/completions", json.dumps({**body, "return_token_ids": True}), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            error = answer.read().decode()
        while not error and (line := answer.readline()):
            if not line.startswith(b"data: {"):
                continue
            said = json.loads(line.removeprefix(b"data: "))
            error = said.get("error", {}).get("message", "")
            new = [token for choice in said.get("choices", ()) for token in choice.get("token_ids") or ()]
            if new and not tokens:
                tell(id=id, first=True)
            tokens += new
    except (OSError, http.client.HTTPException) as broken:
        error = repr(broken)
    tell(id=id, tokens=tokens, error=error, seconds=time.monotonic() - begun)


async def kv_stats() -> dict[str, Any]:
    """Ask every KV manager what has become of its blocks; None where it is out of reach."""
    fleet = find_fleet(FLEET)
    managers = [entry for entry in await asyncio.to_thread(list_entries, fleet) if entry.kind == "kv_manager"]
    found: dict[str, Any] = {}
    async with visitor(fleet) as node:
        for entry in managers:
            found[entry.name] = await _stats(node, entry)
    return found


async def _stats(node: Node, entry: Any) -> dict[str, Any] | None:
    try:
        stats = await node.ref(entry.address).ask(GetKvStats(recall=True), timeout=2.0)
    except BusError:
        return None
    return {name: getattr(stats, name) for name in stats.__struct_fields__}


def take(line: dict[str, Any]) -> None:
    """Do what a line asks for."""
    id, kind = line.pop("id"), line.pop("kind")
    try:
        if kind == "complete":
            complete(id, **line)
        elif kind == "kv_stats":
            tell(id=id, value=asyncio.run(kv_stats()))
        elif kind == "pids":
            tell(id=id, value=[int(path.name) for path in Path("/proc").glob("[0-9]*")])
    except Exception as error:
        tell(id=id, failed=repr(error))


def main() -> None:
    for text in sys.stdin:
        threading.Thread(target=take, args=(json.loads(text),), daemon=True).start()


if __name__ == "__main__":
    main()
