"""The benchmarks of moving pages, on small pools: every job they time is one that they have looked at."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from callboard.bus.testing import run_virtual
from callboard.kv.lanes import MappedLane, PageWrite
from callboard.kv.layout import KvLayout, SlotRun
from callboard.kv.page_store import PageStore

BENCH = Path(__file__).parent.parent.parent / "bench"
LAYOUT = KvLayout(num_layers=3, num_kv_heads=1, head_dim=2, block_size=4)


@pytest.fixture(autouse=True)
def bench_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)


def run(file: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / file), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})


def test_the_lanes_of_one_host_are_measured_beside_memcpy(tmp_path: Path) -> None:
    sides = ["shared pool", "shm", "memcpy"]
    options = ("--rounds", 1, "--sizes", "1,16", "--sides", ",".join(sides), "--json", tmp_path / "result.json")
    done = run("transfer.py", *options, TRANSFER_BLOCKS="64")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    rows = {row["lane"]: row for row in result["rows"]}
    assert set(rows) == set(sides)
    assert rows["shared pool"]["bytes moved"] == 0
    assert rows["shm"]["bytes moved"] == 16 << 20
    assert all(row["16 MiB ms"] > 0 and row["CPU s a GB"] > 0 for row in rows.values())
    assert {"shm at 16 MiB, of memcpy", "bytes moved in a shared pool"} <= {goal["name"] for goal in result["goals"]}


def test_a_page_that_did_not_arrive_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "forgetful.py").write_text(
        f"import runpy, sys; sys.path.insert(0, {str(BENCH)!r})\n"
        "import _transfer_sides as sides\n"
        "check = sides.Pools.check\n"
        "def spoiled(pools, side, blocks):\n"
        "    pools.target.page(3, 1, blocks[1][0])[77] ^= 1\n"
        "    check(pools, side, blocks)\n"
        "sides.Pools.check = spoiled\n"
        f"runpy.run_path({str(BENCH / 'transfer.py')!r}, run_name='__main__')\n"
    )
    command = [sys.executable, str(tmp_path / "forgetful.py"), "--rounds", "1", "--sizes", "1", "--sides"]
    environment = {**os.environ, "TRANSFER_BLOCKS": "8"}
    done = subprocess.run([*command, "ZeroMQ"], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 1
    assert "is not what lies in block" in done.stderr


def test_sending_overlaps_with_computing(tmp_path: Path) -> None:
    options = ("--simulated", 0.4, "--layers", 4, "--tokens", 64, "--rounds", 1, "--json", tmp_path / "result.json")
    done = run("overlap.py", *options)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [row["sending / prefill"] for row in rows] == [0.25, 0.5, 1.0]
    last = rows[-1]
    # Not how fast it is: that sending began before the end of computing.
    assert float(last["tail s"].split()[0]) < 0.9 * last["sending s"]


def test_where_there_is_no_gpu_nothing_is_measured_on_one() -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is one")
    done = run("overlap.py", "--device", "cuda")
    assert (done.returncode, done.stdout) == (0, "")
    assert "there is no CUDA" in done.stderr


# ---- the limited lane ------------------------------------------------------------------------------------------------


def pools() -> tuple[PageStore, PageStore]:
    source, target = PageStore.in_process(LAYOUT, 80), PageStore.in_process(LAYOUT, 80)
    source.view[:] = bytes(i * 7 % 251 for i in range(len(source.view)))
    return source, target


def pages(count: int, layers: range = range(3)) -> PageWrite:
    source = (SlotRun(8, 5), SlotRun(20, count - 5))
    return PageWrite("r", "e", "w", 10, 10 + count, layers, source, (SlotRun(3, count),))


def test_a_limited_lane_moves_what_the_lane_in_it_would() -> None:
    from _limited_lane import LimitedLane, Link

    async def main() -> None:
        source, target = pools()
        _, expected = pools()
        lane = LimitedLane(MappedLane("shm", target, is_owner=False), Link())
        inner = MappedLane("shm", expected, is_owner=False)
        write = pages(290)
        assert await lane.write(source, write) == await inner.write(source, write) == 3 * 2 * 290 * LAYOUT.slot_bytes
        assert target.view == expected.view

    run_virtual(main)


def test_two_writes_share_the_rate_of_a_link() -> None:
    from _limited_lane import LimitedLane, Link

    async def main() -> None:
        source, target = pools()
        link = Link()
        lane: Any = LimitedLane(MappedLane("shm", target, is_owner=False), link)
        loop, num_bytes = asyncio.get_running_loop(), 2 * 290 * LAYOUT.slot_bytes
        link.bytes_per_s = num_bytes / 3.0
        begin = loop.time()
        first = asyncio.ensure_future(lane.write(source, pages(290, range(1))))
        await asyncio.gather(first, lane.write(source, pages(290, range(1, 2))))
        assert loop.time() - begin == pytest.approx(6.0)
        # Nothing went over it for a while: it does not catch up.
        await asyncio.sleep(10.0)
        begin = loop.time()
        await lane.write(source, pages(290, range(1)))
        assert loop.time() - begin == pytest.approx(3.0)

    run_virtual(main)
