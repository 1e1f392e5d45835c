"""The fleet file that ships for UCX, started as its users start it: every page between its engines goes over UCX.

With UCX_FLEET=1 the engines compute, which takes seconds more; else they are simulated.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from callboard.kv.lanes.ucx import is_installed
from callboard.tools.running import find_fleet

pytestmark = pytest.mark.skipif(not is_installed(), reason="ucxx is not installed: it is for Linux on x86_64")
ROOT = Path(__file__).parents[2]
NAME = f"ucx-{os.getpid()}"


def callboard(*arguments: str) -> str:
    command = [sys.executable, "-m", "callboard.tools.cli", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout


def test_the_fleet_that_ships_for_ucx_answers_over_ucx(tmp_path: Path) -> None:
    text, is_real = (ROOT / "fleets" / "ucx.toml").read_text(), bool(os.environ.get("UCX_FLEET"))
    file = tmp_path / "ucx.toml"
    file.write_text(text if is_real else text.replace("[[engine]]", '[[engine]]\nrunner = "simulated"'))
    callboard("up", str(file), "--detach", "--name", NAME, "--port", "0")
    try:
        with httpx.Client(base_url=find_fleet(NAME).state.url or "", timeout=120) as http:
            messages = [{"role": "user", "content": "What is the capital of France?"}]
            body = {"model": "smollm2-135m", "messages": messages, "max_tokens": 32, "temperature": 0}
            answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert not is_real or "Paris" in answer.json()["choices"][0]["message"]["content"]
        parts = json.loads(callboard("requests", answer.headers["x-request-id"], "--fleet", NAME, "--json"))
        [sent] = [part for part in parts if part["verb"] == "remote_send"]
        assert sent["lane"] == "ucx"
        assert sent["num_bytes"] > 0
        assert "kv-cpu1: ucx" in callboard("ps", NAME)  # Beside the manager that sends.
    finally:
        callboard("down", NAME)
