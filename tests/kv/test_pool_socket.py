import asyncio
import os
import stat
import subprocess
import sys

import pytest

from callboard.kv.lanes import PageWrite, open_lane, open_pool
from callboard.kv.layout import KvLayout, SlotRun
from callboard.kv.page_store import PageStore
from callboard.kv.pool_socket import PoolServer, WrongPool, fetch_pool
from callboard.kv.published import published_to_processes

LAYOUT = KvLayout(num_layers=2, num_kv_heads=1, head_dim=4, block_size=4)

OWNER = """
import asyncio, sys
from callboard.kv.layout import KvLayout
from callboard.kv.published import published_to_processes

async def main():
    layout = KvLayout(num_layers=2, num_kv_heads=1, head_dim=4, block_size=4)
    with published_to_processes(sys.argv[1], "pool", layout, 8, epoch="e1", fd=None) as pool:
        print(pool.path, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        print(bytes(pool.store.slot(1, 1, 31)).hex(), flush=True)

asyncio.run(main())
"""


@pytest.fixture
def owner(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path / "pools")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield process
        process.kill()


async def test_one_process_writes_into_the_pool_of_another(owner):
    path = owner.stdout.readline().strip()
    assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700
    mine = PageStore.create(LAYOUT, 2)
    mine.slot(1, 1, 5)[:] = bytes(range(16))
    lane = await open_lane(path, None, epoch="e1")
    assert lane.name == "shm"
    pages = PageWrite("r", "e1", "w", 0, 2, range(2), (SlotRun(4, 2),), (SlotRun(30, 2),))
    assert await lane.write(mine, pages) == 2 * 2 * 2 * 16
    owner.stdin.write("\n")
    owner.stdin.flush()
    assert owner.stdout.readline().strip() == bytes(range(16)).hex()
    lane.close()
    mine.close()


async def test_a_pool_outlives_the_process_that_made_it(owner):
    store = await fetch_pool(owner.stdout.readline().strip())
    store.slot(0, 0, 0)[:] = b"still here......"
    owner.kill()
    owner.wait()
    assert store.slot(0, 0, 0) == b"still here......"
    store.close()


async def test_another_epochs_pool_is_not_mapped(tmp_path):
    with published_to_processes(str(tmp_path), "p", LAYOUT, 2, epoch="new", fd=None) as pool:
        with pytest.raises(WrongPool):
            await fetch_pool(pool.path, epoch="old")


async def test_a_lane_knows_which_slots_the_peer_has(tmp_path):
    with published_to_processes(str(tmp_path), "p", LAYOUT, 2, epoch="e", fd=None) as pool:
        lane = await open_lane(pool.path, None, epoch="e")
        assert lane.fits([SlotRun(7, 1)])
        assert not lane.fits([SlotRun(7, 2)])
        assert not lane.fits([SlotRun(-1, 1)])
        lane.close()


async def test_a_pool_that_is_gone_cannot_be_reached(tmp_path):
    with published_to_processes(str(tmp_path), "p", LAYOUT, 2, epoch="e", fd=None) as pool:
        pass
    with pytest.raises(OSError, match="No such file"):
        await open_pool(pool.path, None)
    with pytest.raises(FileNotFoundError):
        await open_pool("inproc:nobody", {})


async def test_a_directory_open_to_others_is_refused(tmp_path):
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(PermissionError, match="0700"):
        with published_to_processes(str(tmp_path / "open"), "p", LAYOUT, 2, epoch="e", fd=None):
            pass


async def test_a_path_too_long_for_a_socket_is_refused_with_a_sentence(tmp_path):
    with pytest.raises(OSError, match="too long for a unix socket"):
        with published_to_processes(str(tmp_path / ("x" * 120)), "p", LAYOUT, 2, epoch="e", fd=None):
            pass


async def test_many_may_map_a_pool_at_once(tmp_path):
    store = PageStore.create(LAYOUT, 2)
    server = PoolServer(str(tmp_path / "p"), store, "e")
    server.start()
    stores = await asyncio.gather(*(fetch_pool(server.path) for _ in range(20)))
    for other in stores:
        other.close()
    server.close()
    server.close()
    store.close()
