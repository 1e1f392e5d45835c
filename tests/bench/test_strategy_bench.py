"""bench/strategies.py: its workloads, its client, what it keeps, and the whole of it on engines that sleep."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from math import inf
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from callboard.actors.protocol import Generate, Token
from callboard.bus import Node
from callboard.bus.clock import VirtualClock
from callboard.bus.testing import run_virtual
from callboard.bus.transports.inproc import InprocHub

BENCH = Path(__file__).parent.parent.parent / "bench"


@pytest.fixture(autouse=True)
def bench_on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(BENCH)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "_strategies"]:
        del sys.modules[name]


# ---- workloads -------------------------------------------------------------------------------------------------------


def test_a_seed_is_the_same_work_at_every_rate() -> None:
    from _strategies.mixes import MIXES, draw_calls

    slow, fast = (draw_calls(MIXES[0], rate, 2000, 7) for rate in (2.0, 8.0))
    assert [(c.num_prompt, c.num_output) for c in slow] == [(c.num_prompt, c.num_output) for c in fast]
    assert [c.at_s for c in slow] == pytest.approx([4 * c.at_s for c in fast])
    assert slow[-1].at_s == pytest.approx(1000.0, rel=0.1)
    gaps = [b.at_s - a.at_s for a, b in pairwise(slow)]
    assert fmean(gap > 0.5 for gap in gaps) == pytest.approx(0.368, abs=0.03), "arrivals are no Poisson process"
    assert fmean(c.num_prompt for c in slow) == pytest.approx(MIXES[0].num_prompt, rel=0.02)
    assert {c.at_s for c in draw_calls(MIXES[0], inf, 5, 7)} == {0.0}


def test_prompts_share_prefixes_only_where_a_mix_wants_it() -> None:
    from _strategies.mixes import MIXES, draw_calls, draw_prompts

    def beginnings(mix: Any, *seeds: str) -> list[bytes]:
        calls = draw_calls(mix, 1.0, 50, 7)
        return [prompt[: 4 * 16] for seed in seeds for prompt in draw_prompts(calls, mix.num_prefix, 512, seed)]

    alone = beginnings(MIXES[0], "one", "other")
    assert len(set(alone)) == len(alone)
    shared = next(mix for mix in MIXES if mix.num_prefixes)
    assert len(set(beginnings(shared, "one"))) <= shared.num_prefixes
    assert not set(beginnings(shared, "one")) & set(beginnings(shared, "other"))


def test_strategies_take_turns_within_a_round() -> None:
    from _strategies.measure import plan
    from _strategies.mixes import MIXES
    from _strategies.strategies import strategies_here

    cells = plan(3, MIXES[:5], strategies_here())
    assert len({cell.key for cell in cells}) == len(cells)
    assert [cell.round for cell in cells] == sorted(cell.round for cell in cells)
    first = [cell.strategy.name for cell in cells if (cell.round, cell.mix, cell.utilisation) == (0, MIXES[0], 0.9)]
    second = [cell.strategy.name for cell in cells if (cell.round, cell.mix, cell.utilisation) == (1, MIXES[0], 0.9)]
    assert sorted(first) == sorted(second)
    assert first != second
    assert "migrate" not in first
    assert "migrate" in {cell.strategy.name for cell in cells if cell.mix == MIXES[4]}


# ---- the client ------------------------------------------------------------------------------------------------------


class OneAtATime:
    """Answers requests one after another, each in two tokens that take a second."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def on_generate(self, message: Generate) -> AsyncIterator[Token]:
        async with self._turn:
            await asyncio.sleep(1.0)
            yield Token(0, 5)
            await asyncio.sleep(1.0)
            yield Token(1, 5, finish_reason="length")


def ran(calls: list[tuple[float, int]], num_at_once: int | None = None) -> Any:
    """Return what the client tells of a block, on a virtual clock."""
    from _strategies.load import Block, Client
    from _strategies.mixes import Call

    async def main() -> Any:
        hub = InprocHub()
        options = [(name, f"inproc://{name}", hub.transport()) for name in ("server", "client")]
        server, client = (Node(name, endpoint=e, transport=t, clock=VirtualClock()) for name, e, t in options)
        async with server, client:
            address = server.add("router", OneAtATime()).address
            some = [Call(at_s, 4, num_output) for at_s, num_output in calls]
            return await Client(client).run(Block([address], "m", some, 0, 512, "seed", num_at_once=num_at_once))

    return run_virtual(main)


def test_requests_are_sent_when_they_are_due_and_counted_from_then() -> None:
    met = ran([(0.0, 2), (0.5, 2), (1.0, 2)]).met
    assert [each.late_s for each in met] == pytest.approx([0.0, 0.0, 0.0], abs=1e-6)
    # The second waited for the first one's two seconds, the third for four: none of it is lost.
    assert [each.ttft_s for each in met] == pytest.approx([1.0, 2.5, 4.0], abs=0.01)
    assert [each.jct_s for each in met] == pytest.approx([2.0, 3.5, 5.0], abs=0.01)
    assert [each.longest_gap_s for each in met] == pytest.approx([1.0] * 3, abs=0.01)


def test_clients_that_wait_send_the_next_request_when_they_are_answered() -> None:
    met = ran([(0.0, 2)] * 3, num_at_once=1).met
    assert [each.jct_s for each in met] == pytest.approx([2.0] * 3, abs=0.01)


def test_an_answer_that_is_too_short_is_a_failure() -> None:
    (met,) = ran([(0.0, 3)]).met
    assert met.error == "2 tokens of 3 came"


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_a_run_goes_on_where_another_was_cut_short(tmp_path: Path) -> None:
    from _strategies.model import Shape
    from _strategies.records import Compared, Records, Setup

    setup = Setup(Shape(), [256], 10, {"cores": 2}, False)
    records = Records(tmp_path / "kept", setup)
    records.add(Compared("engines", 0, {"x": 1.0}))
    with (tmp_path / "kept").open("ab") as file:
        file.write(b'{"type":"Compared","what":"engi')  # It was killed while it wrote.
    again = Records(tmp_path / "kept", setup)
    assert again.compared["engines", 0].values == {"x": 1.0}
    again.add(Compared("engines", 1, {"x": 2.0}))
    assert set(Records(tmp_path / "kept", setup).compared) == {("engines", 0), ("engines", 1)}
    with pytest.raises(SystemExit, match="set up otherwise"):
        Records(tmp_path / "kept", Setup(Shape(), [256], 10, {"cores": 2}, False, scripts={"adaptive": "changed"}))


# ---- the whole -------------------------------------------------------------------------------------------------------


def test_strategies_are_compared_on_engines_that_sleep(tmp_path: Path) -> None:
    options = ("--quick", "--simulated", "--rounds", 1, "--requests", 4, "--only", "least_loaded,disaggregate,adaptive")
    command = [sys.executable, BENCH / "strategies.py", *options, "--json", tmp_path / "found.json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(row["n"], row["failed"]) for row in found["rows"]] == [(4, 0)] * 3
    for row in found["rows"]:
        low, high = row["JCT ms"][1:]
        assert 0 < low <= row["JCT ms"][0] <= high
        assert row["TTFT ms"][0] < row["JCT ms"][0]
        assert row["cached tokens"] == (0 if row["strategy"] != "1P1D: disaggregate" else row["cached tokens"])
    assert len(found["choices"]) == 1
    assert {cut["against"] for cut in found["cuts"]} == {"data parallel", "1P1D"}
    assert {each["what"] for each in found["compared"]} >= {"engines", "frontend", "router, 1 at a time"}
    assert found["setup"]["simulated"]
