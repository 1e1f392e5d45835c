"""A pool in GPU memory, over a stand-in for the driver: its calls, its descriptors, and what it says when it cannot."""

import ctypes
import os
import signal
import subprocess
import sys

import pytest

from callboard.kv.cuda_driver import (
    AllocFlags,
    CudaDriver,
    CudaError,
    MemAccessDesc,
    MemAllocationProp,
    MemLocation,
    Uuid,
)
from callboard.kv.device_store import DeviceStore, cuda_ordinal
from callboard.kv.layout import KvLayout

LAYOUT = KvLayout(num_layers=2, num_kv_heads=1, head_dim=4, block_size=4)

OWNER = """
import asyncio, sys
from callboard.kv.layout import KvLayout
from callboard.kv.published import published_to_processes

async def main():
    layout = KvLayout(num_layers=2, num_kv_heads=1, head_dim=4, block_size=4)
    with published_to_processes(sys.argv[1], "kv", layout, 8, epoch="e", fd=None, device="cuda:0") as pool:
        print("published", "torch" in sys.modules, flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        pool.store.copy_in(64, memoryview(b"kept"))
        print("written", flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""

READER = """
import asyncio, sys
from callboard.kv.pool_socket import WrongPool, fetch_pool

async def main():
    try:
        await fetch_pool(sys.argv[1], epoch="another")
    except WrongPool as error:
        print(error, flush=True)
    store = await fetch_pool(sys.argv[1], epoch="e")
    print(store.device, store.gpu, store.num_blocks, flush=True)
    sys.stdin.readline()
    got = bytearray(4)
    store.copy_out(64, memoryview(got))
    print(got.decode(), flush=True)
    store.close()

asyncio.run(main())
"""


def num_fds():
    return len(os.listdir("/proc/self/fd"))


def allocate(driver, num_blocks=8):
    return DeviceStore.allocate(LAYOUT, num_blocks, "cuda:0", driver=driver)


def test_structs_are_of_the_documented_sizes():
    sizes = {MemLocation: 8, AllocFlags: 8, MemAllocationProp: 32, MemAccessDesc: 12, Uuid: 16}
    for struct, size in sizes.items():
        assert ctypes.sizeof(struct) == size, struct
    assert (MemAllocationProp.location.offset, MemAllocationProp.win32HandleMetaData.offset) == (8, 16)
    assert (MemAllocationProp.allocFlags.offset, AllocFlags.usage.offset, MemAccessDesc.flags.offset) == (24, 2, 8)


def test_a_pool_takes_whole_steps_of_memory_and_is_where_it_says(driver):
    store = allocate(driver)
    assert (store.device, store.num_slots, store.num_bytes) == ("cuda:0", 32, 2 << 20)
    seen = store.__cuda_array_interface__
    assert (seen["shape"], seen["typestr"], seen["data"]) == ((8 * LAYOUT.block_bytes,), "|u1", (store.address, False))
    store.close()


def test_a_pool_on_a_gpu_has_no_bytes_for_the_host(driver):
    store = allocate(driver)
    with pytest.raises(AttributeError):
        store.page(0, 0, 0)
    store.close()


def test_another_store_of_the_same_descriptor_sees_the_bytes_and_outlives_the_first(driver):
    first = allocate(driver)
    first.copy_in(first.offset(1, 0, 3), memoryview(b"sixteen bytes ok"))
    fd = os.dup(first.fd)
    second = DeviceStore.import_fd(fd, LAYOUT, 8, gpu=first.gpu, num_bytes=first.num_bytes, driver=driver)
    first.close()
    got = bytearray(16)
    second.copy_out(second.offset(1, 0, 3), memoryview(got))
    assert got == b"sixteen bytes ok"
    second.close()


def test_a_closed_pool_leaves_no_descriptor_and_no_mapping(driver):
    before = num_fds()
    store = allocate(driver)
    address = store.address
    store.close()
    store.close()
    assert num_fds() == before
    assert store.is_closed
    with pytest.raises(ValueError, match="closed"):
        _ = store.address
    with open("/proc/self/maps") as maps:
        assert f"{address:x}-" not in maps.read()


def test_a_pool_that_does_not_fit_is_refused_with_a_sentence(driver):
    before = num_fds()
    with pytest.raises(CudaError, match=r"cuda:0 \(Stand-in\) does not have 256 MiB free for a pool") as caught:
        allocate(driver, num_blocks=1 << 20)
    assert caught.value.code == 2
    with pytest.raises(CudaError, match="there is no device cuda:1: this process sees 1 GPUs"):
        DeviceStore.allocate(LAYOUT, 8, "cuda:1", driver=driver)
    assert num_fds() == before


@pytest.mark.parametrize(
    ("gpu", "num_bytes", "words"),
    [("", 1000, "takes 2048 bytes, and this one has 1000"), ("ff" * 16, 2 << 20, "which this process does not see")],
)
def test_a_descriptor_that_is_no_such_pool_is_refused_and_closed(driver, gpu, num_bytes, words):
    store = allocate(driver)
    before = num_fds()
    fd = os.dup(store.fd)
    with pytest.raises((ValueError, CudaError), match=words):
        DeviceStore.import_fd(fd, LAYOUT, 8, gpu=gpu or store.gpu, num_bytes=num_bytes, driver=driver)
    assert num_fds() == before
    store.close()


def test_memory_that_cannot_be_imported_is_refused_when_it_is_mapped(driver):
    other = os.memfd_create("not a pool")
    store = DeviceStore.import_fd(other, LAYOUT, 8, gpu=driver.gpus()[0].uuid, num_bytes=2 << 20, driver=driver)
    with pytest.raises(CudaError, match="cuMemMap failed"):
        _ = store.address
    store.close()


def test_without_a_driver_or_a_gpu_it_says_so(stand_in, monkeypatch):
    with pytest.raises(CudaError, match=r"the driver of NVIDIA GPUs cannot be loaded: libnone\.so"):
        CudaDriver("libnone.so")
    with pytest.raises(CudaError, match="is too old: it has no cuInit"):
        CudaDriver("libc.so.6")
    monkeypatch.setenv("STAND_IN_HAS_NO_GPU", "1")
    with pytest.raises(CudaError, match=r"no CUDA-capable device is detected \(100\)"):
        CudaDriver(str(stand_in / "libcuda.so.1"))


def test_devices_are_named_by_their_ordinal():
    assert [cuda_ordinal(name) for name in ("cuda:0", "cuda:12", "cuda", "cuda:-1", "cpu:0", "cuda:0x")] == [
        *(0, 12),
        *(None, None, None, None),
    ]


def start(script, path, stand_in):
    environment = {**os.environ, "LD_LIBRARY_PATH": str(stand_in), "STAND_IN_TELLS": "1"}
    command = [sys.executable, "-c", script, str(path)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_a_pool_of_a_gpu_goes_to_another_process_and_outlives_its_killed_owner(stand_in, tmp_path):
    folder = tmp_path / "p"
    with start(OWNER, folder, stand_in) as owner:
        try:
            assert owner.stdout.readline() == "published False\n"
            with start(READER, folder / "kv.pool", stand_in) as reader:
                assert "hands out the pool of epoch e" in reader.stdout.readline()
                assert reader.stdout.readline() == f"cuda:0 {bytes(range(0xA0, 0xB0)).hex()} 8\n"
                owner.stdin.write("\n")
                owner.stdin.flush()
                assert owner.stdout.readline() == "written\n"
                owner.send_signal(signal.SIGKILL)
                owner.wait()
                # Owning and handing out took no context; writing did.
                assert owner.stderr.read() == "context\n"
                assert reader.communicate("\n", timeout=20) == ("kept\n", "context\n")
                assert reader.returncode == 0
        finally:
            owner.kill()
