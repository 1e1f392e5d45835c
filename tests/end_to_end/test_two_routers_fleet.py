"""The fleet file that ships with two routers, started as its users start it: one of them is killed, and none is missed.

Its engines are simulated here; tests/survival kills routers before engines that compute, under load.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
from waiting import wait_until

from callboard.tools.running import find_fleet

ROOT = Path(__file__).parents[2]
NAME = f"two-routers-{os.getpid()}"


def callboard(*arguments: str) -> str:
    command = [sys.executable, "-m", "callboard.tools.cli", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout


def routers() -> dict[str, dict[str, Any]]:
    [fleet] = json.loads(callboard("ps", NAME, "--json"))
    return {actor["name"]: actor for actor in fleet["actors"] if actor["kind"] == "router"}


def test_the_fleet_that_ships_with_two_routers_outlives_either(tmp_path: Path) -> None:
    text = (ROOT / "fleets" / "two-routers.toml").read_text()
    file = tmp_path / "two-routers.toml"
    file.write_text(text.replace("[[engine]]", '[[engine]]\nrunner = "simulated"'))
    callboard("up", str(file), "--detach", "--name", NAME, "--port", "0")
    try:
        before = routers()
        assert list(before) == ["main-0", "main-1"]
        assert len({each["pid"] for each in before.values()} | {0}) == 3
        with httpx.Client(base_url=find_fleet(NAME).state.url or "", timeout=60) as http:
            body = {"model": "smollm2-135m", "prompt": "Hello", "max_tokens": 8, "ignore_eos": True, "n": 4}

            def ask() -> str:
                answer = http.post("/v1/completions", json=body)
                assert answer.status_code == 200, answer.text
                assert [choice["finish_reason"] for choice in answer.json()["choices"]] == ["length"] * 4
                return str(answer.headers["x-request-id"])

            parts = json.loads(callboard("requests", ask(), "--fleet", NAME, "--json"))
            generated = [part["request_id"] for part in parts if part["verb"] == "start_generate"]
            assert len(generated) == len(set(generated)) == 4, "both routers tell of their part"
            os.kill(before["main-0"]["pid"], signal.SIGKILL)
            for _ in range(5):
                ask()
            wait_until(lambda: routers().get("main-0", {}).get("pid") not in (None, before["main-0"]["pid"]))
            after = routers()
            assert (after["main-0"]["num_restarts"], after["main-1"]["num_restarts"]) == (1, 0)
            assert after["main-1"]["pid"] == before["main-1"]["pid"]
            assert http.get("/health/ready").status_code == 200
    finally:
        callboard("down", NAME)
