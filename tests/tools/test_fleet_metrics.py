"""Metrics of a real fleet: what was asked of it to the token, over an engine's restart, and in the dashboard."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from served_fleet import BLOCK_SIZE, Scraped, ServedFleet, samples_of, value

Eventually = Callable[..., None]
PREFIXES = ("callboard_", "process_")
STATES = ("free", "cached", "used", "quarantined")


def engine(name: str) -> dict[str, str]:
    return {"model_name": "tiny", "engine": name}


def awaited(fleet: ServedFleet, eventually: Eventually, *expected: tuple[str, dict[str, str], float]) -> Scraped:
    """Scrape until everything expected is there: engines and managers report some times a second."""
    found: list[Scraped] = []

    def wrong() -> list[Any]:
        found.append(fleet.scrape())
        seen = [(name, labels, value(found[-1], f"callboard_{name}", **labels)) for name, labels, _ in expected]
        return [(each, other) for each, other in zip(seen, expected, strict=True) if each != other]

    with contextlib.suppress(AssertionError):
        eventually(lambda: not wrong())
    assert not wrong()
    return found[-1]


def test_a_scrape_of_a_fleet_says_what_went_through_it_to_the_token(place: Any, eventually: Eventually) -> None:
    fleet = ServedFleet(place)
    first, short = "a" * 100, "b" * 10
    for prompt in (first, short, first, first + "c" * 50):
        assert fleet.complete(prompt, max_tokens=6)[0] == 200
    num_prompt = 100 + 10 + 100 + 150
    # The third and the fourth prompt find the full blocks of the first.
    hits = 2 * (100 // BLOCK_SIZE * BLOCK_SIZE)
    token_bytes = 2 * 2 * 2 * 16 * 4  # Keys and values of 2 layers, 2 heads of 16 numbers in float32.
    http = {"model_name": "tiny", "endpoint": "completions", "status": "200"}
    num_cached = (150 + 6) // BLOCK_SIZE  # Of the fourth prompt and its answer; the others share them, or fill none.
    found = awaited(
        fleet,
        eventually,
        ("prompt_tokens_total", engine("decode"), num_prompt),
        ("kv_blocks", {"kv_manager": "kv-cpu1", "state": "cached"}, num_cached),
        ("kv_blocks", {"kv_manager": "kv-cpu1", "state": "used"}, 0),
        ("kv_blocks", {"kv_manager": "kv-cpu1", "state": "quarantined"}, 0),
        ("prompt_tokens_total", engine("prefill"), 0),
        ("computed_prompt_tokens_total", engine("prefill"), num_prompt - hits),
        ("computed_prompt_tokens_total", engine("decode"), 0),
        ("generation_tokens_total", engine("decode"), 4 * 6),
        ("request_success_total", {"finished_reason": "length", **engine("decode")}, 4),
        ("request_success_total", {"finished_reason": "error", **engine("decode")}, 0),
        ("num_preemptions_total", engine("decode"), 0),
        ("num_requests_running", engine("decode"), 0),
        ("kv_cache_usage_perc", engine("decode"), 0),
        *(("prefix_cache_queries_total", {"kv_manager": each}, num_prompt) for each in ("kv-cpu0", "kv-cpu1")),
        *(("prefix_cache_hits_total", {"kv_manager": each}, hits) for each in ("kv-cpu0", "kv-cpu1")),
        ("kv_sent_bytes_total", {"kv_manager": "kv-cpu0"}, (num_prompt - hits) * token_bytes),
        ("kv_sent_bytes_total", {"kv_manager": "kv-cpu1"}, 0),
        ("requests_total", http, 4),
        ("time_to_first_token_seconds_count", {"model_name": "tiny"}, 4),
        ("inter_token_latency_seconds_count", {"model_name": "tiny"}, 4 * 5),
        ("request_prompt_tokens_sum", {"model_name": "tiny"}, num_prompt),
        ("engine_info", {**engine("decode"), "kv_manager": "kv-cpu1", "roles": "decode", "device": "cpu:1"}, 1),
        ("router_info", {"router": "main", "script": "disaggregate"}, 1),
        ("bus_links", {"node": "control"}, 4),
        ("directory_up", {}, 1),
    )
    blocks = {state: value(found, "callboard_kv_blocks", kv_manager="kv-cpu1", state=state) for state in STATES}
    assert sum(blocks.values()) == fleet.rows()["kv-cpu1"]["num_blocks"]


def test_an_engine_that_restarts_begins_anew_and_one_that_is_stopped_is_missing(
    place: Any, eventually: Eventually
) -> None:
    fleet = ServedFleet(place, more='[[actor]]\nname = "ping"\nclass = "my_actors:Ping"\n')
    for _ in range(3):
        assert fleet.complete("x" * 40)[0] == 200
    ended = {"finished_reason": "length", **engine("decode")}
    computed = ("computed_prompt_tokens_total", engine("prefill"), 40 + 2 * 8)
    before = awaited(fleet, eventually, ("request_success_total", ended, 3), computed)
    os.kill(fleet.rows()["decode"]["pid"], signal.SIGKILL)
    eventually(lambda: fleet.rows().get("decode", {}).get("num_restarts") == 1)
    eventually(lambda: fleet.get("/health/ready")[0] == 200)
    assert fleet.complete("x" * 40)[0] == 200
    after = awaited(fleet, eventually, ("request_success_total", ended, 1))
    counters = [key for key in after if key[0].endswith(("_total", "_count", "_sum", "_bucket"))]
    shrunk = {key[0].removeprefix("callboard_") for key in counters if after[key] < before.get(key, 0)}
    # The restarted engine's own: rate() takes a counter that shrinks for one that has begun anew.
    assert shrunk == {"prompt_tokens_total", "generation_tokens_total", "request_success_total"}
    started = "callboard_actor_start_time_seconds"
    assert value(after, started, actor="decode") > value(before, started, actor="decode")
    assert value(after, started, actor="kv-cpu1") == value(before, started, actor="kv-cpu1")
    assert value(after, "callboard_requests_total", status="200") == 4

    # An engine that is stopped is missing, too, but nobody restarts it.
    assert fleet.get("/health/ready") == (200, '{"status":"ok","missing":[]}')
    pid = fleet.rows()["decode"]["pid"]
    os.kill(pid, signal.SIGSTOP)  # Its lease lapses, and nobody restarts it.
    eventually(lambda: fleet.get("/health/ready")[0] == 503)
    assert json.loads(fleet.get("/health/ready")[1])["missing"] == ["model tiny has no ready engine for decode"]
    assert fleet.get("/health/live")[0] == 200
    os.kill(pid, signal.SIGCONT)
    eventually(lambda: fleet.get("/health/ready")[0] == 200)


def expressions(panel: dict[str, Any]) -> list[str]:
    return [target["expr"] for target in panel.get("targets", ())]


def test_every_metric_of_the_dashboard_is_in_a_scrape_and_every_series_of_the_fleet_in_the_dashboard(
    fleet: ServedFleet, eventually: Eventually
) -> None:
    place = fleet.place
    fleet.complete("x")
    eventually(lambda: "callboard_requests_total{" in fleet.get("/metrics")[1])  # Counted after it was answered.
    scraped = fleet.get("/metrics")[1]
    names = {name for name, _ in samples_of(scraped)}
    dashboard = json.loads(place.callboard("metrics", "--dashboard").stdout)
    queries = [each for panel in dashboard["panels"] for each in expressions(panel)]
    queries += [each["definition"] for each in dashboard["templating"]["list"] if "definition" in each]
    used = {word for query in queries for word in re.findall(r"[a-z0-9_]+", query) if word.startswith(PREFIXES)}
    assert used <= names
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in names if name.startswith("callboard_")}
    assert families == {re.sub(r"_(bucket|count|sum)$", "", name) for name in used if name.startswith("callboard_")}
    assert place.callboard("metrics", "test").stdout.splitlines()[0] == scraped.splitlines()[0]


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "callboard.tools.cli", "metrics", "--dashboard"],
        capture_output=True,
        text=True,
        check=True,
    )
    dashboard = json.loads(done.stdout)
    assert (dashboard["uid"], dashboard["title"], "id" in dashboard) == ("callboard", "Callboard", False)
    variables = {each["name"]: each["type"] for each in dashboard["templating"]["list"]}
    assert variables == {"datasource": "datasource", "model_name": "query", "engine": "query"}
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
        for expression in expressions(panel):
            assert all(expression.count(left) == expression.count(right) for left, right in ("()", "{}", "[]"))
            assert set(re.findall(r"\$(\w+)", expression)) <= {"model_name", "engine", "__rate_interval"}


@pytest.mark.parametrize("words", [["metrics"], ["top"], ["top", "--json"]])
def test_without_a_fleet_there_is_one_sentence(place: Any, words: list[str]) -> None:
    done = place.run(*words)
    assert (done.returncode, done.stderr) == (2, 'callboard: no fleet is running: start one with "callboard up"\n')
