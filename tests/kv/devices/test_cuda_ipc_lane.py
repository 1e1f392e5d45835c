"""The lane between pools of one GPU: when it is taken, and that nothing ends before the GPU does."""

import asyncio

import pytest

from callboard.kv.device_store import DeviceStore
from callboard.kv.lanes import LaneClosed, PageWrite, is_mappable, usable_lanes
from callboard.kv.lanes.cuda_ipc import CudaIpcLane, until_done
from callboard.kv.layout import KvLayout, SlotRun

LAYOUT = KvLayout(num_layers=2, num_kv_heads=1, head_dim=4, block_size=4)
PAGES = PageWrite("r", "e", "w", 0, 4, range(1, 2), (SlotRun(3, 4),), (SlotRun(8, 4),))


class Gpu:
    """Copies when it is told to finish, as a GPU does on its own."""

    def __init__(self):
        self.work = []

    def copy(self, source, target, source_runs, target_runs, layers):
        self.work.append((source, target, source_runs[0], target_runs[0], layers))
        self.is_done = False
        return self

    def query(self):
        return self.is_done

    def finish(self):
        for source, target, read, write, layers in self.work:
            for layer in layers:
                for half in (0, 1):
                    data = bytearray(read.count * LAYOUT.slot_bytes)
                    source.copy_out(source.offset(layer, half, read.slot), memoryview(data))
                    target.copy_in(target.offset(layer, half, write.slot), memoryview(data))
        self.is_done = True


@pytest.fixture
def stores(driver):
    stores = [DeviceStore.allocate(LAYOUT, 8, "cuda:0", driver=driver) for _ in range(2)]
    stores[0].copy_in(0, memoryview(bytes(range(256)) * 8))
    yield stores
    for store in stores:
        store.close()


def lane_of(target, gpu, *, is_owner=True):
    return CudaIpcLane("cuda_ipc", target, is_owner=is_owner, pages_of=lambda device: gpu)


async def turns(count=60):
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_write_returns_its_bytes_when_the_gpu_is_done(stores):
    gpu = Gpu()
    lane = lane_of(stores[1], gpu)
    writing = asyncio.ensure_future(lane.write(stores[0], PAGES))
    await turns()
    assert not writing.done()
    gpu.finish()
    assert await writing == 2 * 4 * LAYOUT.slot_bytes
    sent, came = (bytearray(4 * LAYOUT.slot_bytes) for _ in range(2))
    stores[0].copy_out(stores[0].offset(1, 1, 3), memoryview(sent))
    stores[1].copy_out(stores[1].offset(1, 1, 8), memoryview(came))
    assert sent == came != bytearray(len(came))


async def test_a_cancelled_write_is_over_only_when_the_gpu_is(stores):
    gpu = Gpu()
    writing = asyncio.ensure_future(lane_of(stores[1], gpu).write(stores[0], PAGES))
    await turns(3)
    for _ in range(3):
        writing.cancel()
        await turns()
        assert not writing.done()
    gpu.finish()
    with pytest.raises(asyncio.CancelledError):
        await writing


async def test_a_lane_closed_under_a_write_keeps_the_pool_mapped_until_the_gpu_is_done(stores):
    gpu = Gpu()
    lane = lane_of(stores[1], gpu)
    writing = asyncio.ensure_future(lane.write(stores[0], PAGES))
    await turns(3)
    lane.close()
    assert not stores[1].is_closed
    with pytest.raises(LaneClosed):
        await lane.write(stores[0], PAGES)
    gpu.finish()
    await writing
    assert stores[1].is_closed


async def test_a_gpu_that_has_failed_ends_the_write_and_lets_go_of_the_pool(stores):
    class Failing(Gpu):
        def query(self):
            raise RuntimeError("an illegal memory access was encountered")

    lane = lane_of(stores[1], Failing())
    with pytest.raises(RuntimeError, match="illegal"):
        await lane.write(stores[0], PAGES)
    lane.close()
    assert stores[1].is_closed


async def test_a_lane_into_its_own_pool_leaves_it_open(stores):
    lane = lane_of(stores[0], Gpu(), is_owner=False)
    lane.close()
    assert not stores[0].is_closed
    assert lane.fits((SlotRun(0, 32),))
    assert not lane.fits((SlotRun(0, 33),))


async def test_waiting_for_a_gpu_goes_on_when_turns_of_the_loop_are_not_enough():
    asked = iter([False] * 60 + [True])

    class Work:
        def query(self):
            return next(asked)

    await until_done(Work())
    assert next(asked, None) is None


class Wires:
    """Whether there is UCX."""

    def __init__(self, is_usable):
        self.is_usable = is_usable


@pytest.mark.parametrize("wire", [["ucx"], []])
def test_pools_of_one_gpu_are_mapped_and_others_go_over_a_wire(wire):
    def lanes(ours, theirs, *, is_near=True):
        wires = Wires(bool(wire))
        kinds = [kind for kind in usable_lanes("auto", wires, ours) if kind in usable_lanes("auto", wires, theirs)]
        return [kind for kind in kinds if kind == "ucx" or is_mappable(kind, is_near=is_near, gpus=(ours, theirs))]

    assert lanes("a", "a") == ["cuda_ipc", *wire]
    assert lanes("", "") == ["shm", *wire]
    for ours, theirs, is_near in (("a", "b", True), ("", "a", True), ("a", "", True), ("a", "a", False)):
        assert lanes(ours, theirs, is_near=is_near) == wire


def test_a_forced_lane_rules_out_all_others():
    wires = Wires(is_usable=True)
    assert usable_lanes("cuda_ipc", wires, "a") == ("cuda_ipc",)
    assert usable_lanes("cuda_ipc", wires) == ()
    assert usable_lanes("shm", wires, "a") == ()
    assert usable_lanes("ucx", wires, "a") == ("ucx",)
