"""Replaying in a simulation: what was recorded comes again, and another script does what it would have done."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from replayed import CONFIG, FLEET, MODEL, SCRIPT, Load, load, record

from callboard.actors.engine.simulated import Simulation
from callboard.bus.taps import SENT
from callboard.kv.lanes import pace
from callboard.tools.cli import main
from callboard.tools.replay.costs import CostsOf
from callboard.tools.replay.recorded import HashedTokens, Requests
from callboard.tools.replay.report import Report
from callboard.tools.replay.simulated import simulate
from callboard.tools.replay.tape import Tape, read_tape
from callboard.tools.trace.event import Event


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages take no time: else they take a random one, which a replay knows the mean of."""
    monkeypatch.setattr(pace, "PAGE_S", (0.0,))


@pytest.fixture(autouse=True)
def nobody_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))


def replay(path: Path, *words: str, capsys: pytest.CaptureFixture[str]) -> Report:
    assert main(["replay", str(path), "--json", *words]) == 0
    return msgspec.json.decode(capsys.readouterr().out, type=Report)


def tape(path: Path) -> Tape:
    return read_tape(str(path), is_partial=False, limit=None, show=lambda text: None)


# ---- what was recorded comes again ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize(
    ("script", "engines", "is_shared"),
    [
        ("disaggregate", ("d0", "d1", "p0", "p1"), False),
        ("disaggregate", ("d0", "p0", "p1"), True),
        ("balanced", ("d0", "p0", "p1"), False),
        ("least_loaded", ("x0", "x1", "x2"), False),
    ],
)
def test_a_replay_decides_as_was_recorded_and_takes_as_long(
    tmp_path: Path, script: str, engines: tuple[str, ...], is_shared: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.rec"
    record(path, load(60), script=script, engines=engines, is_shared=is_shared)
    report = replay(path, capsys=capsys)
    assert len(report.requests) == 60
    assert [row.id for row in report.requests if row.decisions[0] != row.decisions[1] or not row.decisions[0]] == []
    for row in report.requests:
        assert row.error == ("", "")
        assert row.num_bytes[0] == row.num_bytes[1]
        assert row.num_cached_tokens[0] == row.num_cached_tokens[1]
        for old, new in (row.ttft_s, row.jct_s):
            assert old is not None
            assert new == pytest.approx(old, rel=0.05), row
    assert report.summary.num_engines_differ == report.summary.num_ranges_differ == 0
    # Inside one pool blocks change hands, and nothing is copied.
    assert (sum(row.num_bytes[0] for row in report.requests) > 0) == (script != "least_loaded" and not is_shared)
    assert sum(row.num_cached_tokens[0] or 0 for row in report.requests) > 0


def test_pages_take_as_long_as_they_took(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Random page times: single decisions may fall otherwise, and the means must not.
    path = tmp_path / "a.rec"
    record(path, load(60), engines=("p0", "d0"))
    report = replay(path, capsys=capsys)
    assert report.summary.num_engines_differ == 0
    for quantity in report.summary.quantities:
        assert quantity.recorded is not None
        assert quantity.replayed is not None
        assert quantity.replayed.mean == pytest.approx(quantity.recorded.mean, rel=0.05), quantity
    moved = [row.ttft_s for row in report.requests if row.num_bytes[0] > 50_000]
    assert len(moved) > 10
    assert all(new == pytest.approx(old, rel=0.15) for old, new in moved)


@pytest.mark.usefixtures("steady")
def test_a_small_pool_makes_the_same_trouble_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.rec"
    record(path, load(40, per_s=30), engines=("p0", "d0"), num_blocks=100)
    report = replay(path, capsys=capsys)
    jct = next(each for each in report.summary.quantities if each.name == "JCT")
    assert jct.recorded is not None
    assert jct.replayed is not None
    assert jct.recorded.p99 > 1.0  # They did wait for blocks.
    assert jct.replayed.mean == pytest.approx(jct.recorded.mean, rel=0.05)
    assert report.summary.num_errors[0] == report.summary.num_errors[1]


@pytest.mark.usefixtures("steady")
def test_hashed_prompts_share_what_the_prompts_shared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports = []
    for bodies in ("hashed", "full"):
        path = tmp_path / f"{bodies}.rec"
        record(path, load(30), bodies=bodies)
        reports.append(replay(path, capsys=capsys))
    hashed, full = reports
    assert [row.decisions for row in hashed.requests] == [row.decisions for row in full.requests]
    assert [row.num_cached_tokens for row in hashed.requests] == [row.num_cached_tokens for row in full.requests]


@pytest.mark.usefixtures("steady")
def test_a_client_that_left_leaves_again(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    loads = load(30, leaves=0.5)
    record(path, loads)
    made = tape(path)
    outcomes, _ = simulate(made.requests, made.shape.shape(), made.costs, seed=0, speed=1.0, show=lambda text: None)
    left = [each for each in made.requests if each.leaves_early]
    assert len(left) > 5
    for request in made.requests:
        assert outcomes[request.id].num_tokens == made.outcomes[request.id].num_tokens
        assert outcomes[request.id].error == made.outcomes[request.id].error


@pytest.mark.usefixtures("steady")
def test_an_id_that_was_given_twice_is_two_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.rec"
    record(path, load(10, per_s=2.0), ids=lambda number: f"mine-{number % 5}")
    report = replay(path, capsys=capsys)
    assert sorted(row.id for row in report.requests) == sorted(
        [*(f"mine-{n}" for n in range(5)), *(f"mine-{n}#2" for n in range(5))]
    )
    assert all(len(row.decisions[0]) == 3 and row.decisions[0] == row.decisions[1] for row in report.requests)


@pytest.mark.usefixtures("steady")
def test_speed_brings_the_requests_closer_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    record(path, load(20))
    made = tape(path)
    gaps = []
    for speed in (1.0, 4.0):
        asked: list[float] = []

        def tap(event: Event, asked: list[float] = asked) -> None:
            if event.record.name == "Generate" and event.record.what == SENT:
                asked.append(event.time)

        simulate(made.requests, made.shape.shape(), made.costs, seed=0, speed=speed, show=lambda text: None, tap=tap)
        gaps.append(asked[-1] - asked[0])
    assert gaps[0] == pytest.approx(made.seconds, abs=1e-3)
    assert gaps[1] == pytest.approx(made.seconds / 4, abs=1e-3)


def test_the_same_seed_gives_the_same_result_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    record(path, load(30))
    words = [sys.executable, "-P", "-m", "callboard.tools.cli", "replay", str(path), "--json"]
    outputs = [
        subprocess.run(words, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert len(msgspec.json.decode(outputs[0], type=Report).requests) == 30


# ---- what would my script have done? --------------------------------------------------------------------------------


@pytest.mark.usefixtures("steady")
def test_another_script_does_what_it_does_where_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = tmp_path / "one.rec", tmp_path / "other.rec"
    record(one, load(40), script="disaggregate")
    record(other, load(40), script="balanced", options={"ratio": 0.4})
    what_if = replay(one, "--router", "balanced", "--set", "ratio=0.4", capsys=capsys)
    truth = tape(other).outcomes
    for row in what_if.requests:
        assert list(row.decisions[1]) == [str(decision) for decision in truth[row.id].decisions]
        assert row.jct_s[1] == pytest.approx(truth[row.id].jct_s, rel=0.05)
    assert what_if.summary.num_engines_differ + what_if.summary.num_ranges_differ == 40
    assert any("the simulation's own error" in note and "40 of 40" in note for note in what_if.notes)
    assert "balanced" in what_if.script
    assert "ratio=0.4" in what_if.script


def test_a_script_of_ones_own_is_asked_with_its_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, script = tmp_path / "a.rec", tmp_path / "mine.py"
    script.write_text(SCRIPT)
    record(path, load(10))
    report = replay(path, "--router", str(script), "--set", "where=p1", capsys=capsys)
    assert all(row.decisions[1] == ("start_generate p1",) for row in report.requests)


def test_a_script_that_fails_is_a_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, script = tmp_path / "a.rec", tmp_path / "mine.py"
    script.write_text(SCRIPT.replace('"d0"', '"nobody"'))
    record(path, load(5))
    assert main(["replay", str(path), "--json", "--router", str(script)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    report = msgspec.json.decode(captured.out, type=Report)
    assert report.summary.num_errors == (0, 5)
    assert all("ScriptError" in row.error[1] for row in report.requests)


# ---- other fleets ---------------------------------------------------------------------------------------------------


def test_a_fleet_file_says_what_to_simulate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.rec"
    record(path, load(20, per_s=100))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes(msgspec.json.encode(CONFIG))
    jcts = []
    for count in (1, 4):
        (tmp_path / "fleet.toml").write_text(FLEET.format(count=count))
        report = replay(path, "--simulate", str(tmp_path / "fleet.toml"), capsys=capsys)
        names = {decision.split()[1] for row in report.requests for decision in row.decisions[1]}
        assert names == ({"x"} if count == 1 else {f"x-{n}" for n in range(4)})
        jct = next(each for each in report.summary.quantities if each.name == "JCT")
        assert jct.replayed is not None
        jcts.append(jct.replayed.mean)
    assert jcts[1] < 0.7 * jcts[0]


def test_what_is_simulated_needs_no_port(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.rec"
    record(path, load(3))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes(msgspec.json.encode(CONFIG))
    listen = '[listen]\nhttp = "192.0.2.1:8000"\nfrontends = 2\n'  # An address of another machine.
    (tmp_path / "fleet.toml").write_text(FLEET.format(count=1) + listen)
    assert len(replay(path, "--simulate", str(tmp_path / "fleet.toml"), capsys=capsys).requests) == 3


# ---- what is fitted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load_per_s", [2.0, 20.0])
def test_costs_are_found_again(tmp_path: Path, load_per_s: float) -> None:
    model = Simulation(
        seconds_per_step=7e-3, seconds_per_prefill_token=0.05e-3, seconds_per_decode=0.9e-3, vocab_size=300
    )
    costs = CostsOf()
    for event in record(
        tmp_path / "a.rec", load(40, per_s=load_per_s), engines=("x0", "x1"), model=model, script="least_loaded"
    ):
        costs.add(event)
    fit = costs.fit()
    assert sorted(fit.engines) == ["x0", "x1"]
    for each in fit.engines.values():
        assert each.costs == pytest.approx((7e-3, 0.05e-3, 0.9e-3), rel=0.03)
        assert each.error_p90 < 0.01
    assert fit.latency_s == pytest.approx(0.2e-3, rel=0.05)


def test_an_engine_that_only_computes_prompts_gets_its_other_costs_from_the_others(tmp_path: Path) -> None:
    costs = CostsOf()
    for event in record(tmp_path / "a.rec", load(40), engines=("p0", "d0")):
        costs.add(event)
    fit = costs.fit().engines["p0"]
    assert fit.num_decodes == 0
    wanted = (MODEL.seconds_per_step, MODEL.seconds_per_prefill_token, MODEL.seconds_per_decode)
    assert fit.costs == pytest.approx(wanted, rel=0.1)


def test_an_empty_recording_costs_what_is_usual() -> None:
    costs = CostsOf().fit()
    assert not costs.engines
    assert costs.others.num_prefills == 0
    assert all(cost > 0 for cost in costs.others.costs)


# ---- prompts --------------------------------------------------------------------------------------------------------


def test_pseudo_tokens_are_equal_where_the_blocks_are_and_nowhere_else() -> None:
    one, two, three = (bytes([n]) * 8 for n in (1, 2, 3))
    a = HashedTokens(40, 16, one + two + three).tokens()
    b = HashedTokens(48, 16, one + three + two).tokens()
    assert len(a) == 40 * 4
    assert a[:64] == b[:64]
    assert a[64:128] == b[128:192]
    assert a[64:128] != b[64:128]
    assert HashedTokens(40, 16, one + two + three).tokens(salt=7) != a
    ids = memoryview(b).cast("i").tolist()
    assert min(ids) >= 1
    assert max(ids) <= 200


@pytest.mark.parametrize(
    "prompt",
    [
        {"num_tokens": 1 << 40, "block_size": 1 << 40, "hashes": bytes(8)},
        {"num_tokens": 17, "block_size": 16, "hashes": bytes(8)},
        {"num_tokens": -1, "block_size": 16, "hashes": b""},
        {"num_tokens": 1, "block_size": 0, "hashes": bytes(8)},
        b"abc",
        "text",
    ],
)
def test_a_prompt_that_is_none_is_left_out(tmp_path: Path, prompt: Any) -> None:
    [event] = [
        event
        for event in record(tmp_path / "a.rec", [Load(0.0, (1, 2, 3), 1)])
        if event.record.name == "Generate" and event.record.what == SENT
    ]
    body = msgspec.msgpack.decode(event.record.body)
    raw = msgspec.Raw(msgspec.msgpack.encode({**body, "prompt": prompt}))
    requests = Requests()
    event = Event(event.node, msgspec.structs.replace(event.record, body=raw), event.time, 0.0, 0.0)
    assert requests.add(event) == ""
    assert requests.in_order() == []
