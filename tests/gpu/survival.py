"""What becomes of GPU memory that a process shared, when that process is killed? Two ways of sharing are asked.

``cuda_ipc``: cudaIpcGetMemHandle's handle. ``descriptor``: the pools' own way, cuMemCreate's file descriptor. Each
time an owner writes a pattern, an importer maps it, and the owner is killed with SIGKILL. Then the importer reads the
pattern back, once at once and once after a third process has filled most of the GPU's free memory, so that memory
which was quietly given away is found out; and it writes and reads something of its own.

``late writes``: a process that is killed while the GPU still has a long queue of its writes into a shared pool. Once
its death is proven (its pidfd is readable), which is when a KV manager lends the blocks anew, nothing may change.

torch is not needed. The processes talk by lines of text over pipes: ``survival.py ROLE ARGUMENTS``.
"""

import asyncio
import ctypes
import hashlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / ".typing"))  # There `callboard` is the repository itself.

from callboard.kv.cuda_driver import CudaError, cuda_driver  # noqa: E402
from callboard.kv.device_store import DeviceStore  # noqa: E402
from callboard.kv.layout import KvLayout  # noqa: E402

LAYOUT = KvLayout(num_layers=4, num_kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16")
NUM_BLOCKS = int(os.environ.get("SURVIVAL_BLOCKS", "256"))
NUM_BYTES = NUM_BLOCKS * LAYOUT.block_bytes
PEEKED_BYTES = 4096
QUEUED_WRITES = 20_000
STEP_S = 60.0


def pattern(seed: int) -> bytes:
    """Return what an owner writes."""
    return hashlib.shake_128(bytes([seed])).digest(1 << 20) * (NUM_BYTES >> 20)


# ---- roles: one process each ----------------------------------------------------------------------------------------


class IpcHandle(ctypes.Structure):
    """CUipcMemHandle: 64 bytes, passed by value."""

    _fields_ = (("reserved", ctypes.c_char * 64),)


class Memory:
    """Plain memory of cuMemAlloc, or somebody else's, for what the pools do not do."""

    def __init__(self) -> None:
        self.driver = cuda_driver()
        self.driver.enter(0)
        self._library = ctypes.CDLL("libcuda.so.1")
        self.address = 0

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise CudaError(f"{name} failed ({code})", code=code)

    def allocate(self, num_bytes: int) -> None:
        address = ctypes.c_ulonglong()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(num_bytes))
        self.address = address.value

    def handle(self) -> bytes:
        handle = IpcHandle()
        self.call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_ulonglong(self.address))
        return bytes(memoryview(handle).cast("B"))

    def open(self, handle: bytes) -> None:
        address = ctypes.c_ulonglong()
        own = IpcHandle.from_buffer_copy(handle)
        self.call("cuIpcOpenMemHandle_v2", ctypes.byref(address), own, ctypes.c_uint(1))
        self.address = address.value

    def fill(self, value: int, num_bytes: int) -> None:
        size = ctypes.c_size_t(num_bytes)
        self.call("cuMemsetD8_v2", ctypes.c_ulonglong(self.address), ctypes.c_ubyte(value), size)
        self.call("cuStreamSynchronize", None)

    def queue_fill(self, address: int, value: int, num_bytes: int) -> None:
        size = ctypes.c_size_t(num_bytes)
        self.call("cuMemsetD8Async", ctypes.c_ulonglong(address), ctypes.c_ubyte(value), size, None)

    def copy_out(self, offset: int, out: memoryview) -> None:
        self.driver.copy_out(self.address + offset, out, 0)

    def copy_in(self, offset: int, data: memoryview) -> None:
        self.driver.copy_in(self.address + offset, data, 0)


def say(*words: object) -> None:
    print(*words, flush=True)


def hear() -> str:
    return sys.stdin.readline().strip()


def own_descriptor(folder: str) -> None:
    """Hand out a pool with a pattern in it, as a KV manager does."""
    from callboard.kv.published import published_to_processes

    async def main() -> None:
        with published_to_processes(folder, "kv", LAYOUT, NUM_BLOCKS, epoch="e", fd=None, device="cuda:0") as pool:
            assert isinstance(pool.store, DeviceStore)
            pool.store.copy_in(0, memoryview(bytearray(pattern(1))))
            say(pool.path)
            await asyncio.get_running_loop().create_future()

    asyncio.run(main())


def own_ipc(_: str) -> None:
    """Hand out plain memory with a pattern in it."""
    memory = Memory()
    memory.allocate(NUM_BYTES)
    memory.copy_in(0, memoryview(bytearray(pattern(1))))
    say(memory.handle().hex())
    signal.pause()


def imported(kind: str, shared: str) -> Any:
    """Return what an owner shares, with copy_in and copy_out."""
    if kind == "descriptor":
        from callboard.kv.pool_socket import fetch_pool

        return asyncio.run(fetch_pool(shared, epoch="e"))
    memory = Memory()
    memory.open(bytes.fromhex(shared))
    return memory


def read(store: Any) -> bytes:
    data = bytearray(NUM_BYTES)
    store.copy_out(0, memoryview(data))
    return bytes(data)


def use(kind: str, shared: str) -> None:
    """Map what an owner shares, and look at it when told: ``look SEED``, ``write SEED``, or ``peek`` (at its end)."""
    store = imported(kind, shared)
    read(store)
    say("mapped")
    while word := hear():
        verb, _, seed = word.partition(" ")
        try:
            if verb == "peek":
                end = bytearray(PEEKED_BYTES)
                store.copy_out(NUM_BYTES - PEEKED_BYTES, memoryview(end))
                say(hashlib.sha256(end).hexdigest())
                continue
            if verb == "write":
                store.copy_in(0, memoryview(bytearray(pattern(int(seed)))))
            data = read(store)
        except CudaError as error:
            say(f"error: {error}")
            continue
        say("intact" if data == pattern(int(seed)) else "changed")


def fill(_: str) -> None:
    """Take most of what is free of the GPU, and write over it."""
    memory = Memory()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    memory.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    size = free.value * 9 // 10
    memory.allocate(size)
    memory.fill(0xEE, size)
    say(size)


def write_late(path: str) -> None:
    """Queue writes into somebody's pool for longer than this process will live."""
    memory, store = Memory(), imported("descriptor", path)
    address = store.address
    for number in range(QUEUED_WRITES):
        memory.queue_fill(address, number % 251, NUM_BYTES)
        if number == 100:
            say("writing")
    say("queued")
    signal.pause()


ROLES = {"own_descriptor": own_descriptor, "own_ipc": own_ipc, "fill": fill, "write_late": write_late, "use": use}


# ---- the questions --------------------------------------------------------------------------------------------------


class Role:
    """A process in a role. Its lines must come within STEP_S."""

    def __init__(self, *words: str) -> None:
        command = [sys.executable, __file__, *words]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, bufsize=1)

    def ask(self, word: str = "") -> str:
        """Say something, if it is something, and return the next line."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        if word:
            self.process.stdin.write(word + "\n")
        if not select.select([self.process.stdout], [], [], STEP_S)[0]:
            raise RuntimeError(f"nothing was heard for {STEP_S} s after {word!r}")
        line = self.process.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"it ended: {self.process.stderr.read()[-500:]}")
        return line

    def kill(self) -> float:
        """Kill it; return the seconds until its death was proven."""
        fd = os.pidfd_open(self.process.pid)
        begin = time.perf_counter()
        self.process.send_signal(signal.SIGKILL)
        select.select([fd], [], [], STEP_S)
        seconds = time.perf_counter() - begin
        os.close(fd)
        return seconds

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def survives(kind: str, folder: str) -> dict[str, Any]:
    """Ask one way of sharing."""
    row: dict[str, Any] = {"test": f"memory shared by {kind} survives its owner's kill -9"}
    roles: list[Role] = []
    try:
        owner = Role("own_descriptor" if kind == "descriptor" else "own_ipc", folder)
        roles.append(owner)
        shared = owner.ask()
        user = Role("use", kind, shared)
        roles.append(user)
        user.ask()
        row["before"] = user.ask("look 1")
        row["proof of death ms"] = round(1e3 * owner.kill(), 2)
        row["at once"] = user.ask("look 1")
        filler = Role("fill", "")
        roles.append(filler)
        row["filled MiB"] = int(filler.ask()) >> 20
        row["after others took memory"] = user.ask("look 1")
        row["written anew"] = user.ask("write 2")
    except (OSError, RuntimeError, ValueError) as error:
        row["problem"] = str(error)
    finally:
        for role in roles:
            role.end()
    asked = ("before", "at once", "after others took memory", "written anew")
    row["survives"] = all(row.get(name) == "intact" for name in asked)
    # Of cudaIpc* nothing is promised, and nothing here needs it: whatever it does is an answer.
    row["holds"] = row["survives"] if kind == "descriptor" else "before" in row
    return row


def late_writes(folder: str) -> dict[str, Any]:
    """Ask whether a killed process's queued writes go on after its death is proven."""
    row: dict[str, Any] = {"test": "nothing is written into a pool after its writer's death is proven", "holds": False}
    roles: list[Role] = []
    try:
        owner = Role("own_descriptor", folder)
        roles.append(owner)
        path = owner.ask()
        user = Role("use", "descriptor", path)
        roles.append(user)
        user.ask()
        writer = Role("write_late", path)
        roles.append(writer)
        writer.ask()
        row["proof of death ms"] = round(1e3 * writer.kill(), 2)
        seen = []
        for pause in (0.0, 0.002, 0.02, 0.2):
            time.sleep(pause)
            seen.append(user.ask("peek"))
        untouched = hashlib.sha256(pattern(1)[-PEEKED_BYTES:]).hexdigest()
        row["it had written"] = seen[0] != untouched
        row["holds"] = row["it had written"] and len(set(seen)) == 1
    except (OSError, RuntimeError, ValueError) as error:
        row["problem"] = str(error)
    finally:
        for role in roles:
            role.end()
    return row


def rows() -> list[dict[str, Any]]:
    """Return the answers."""
    found = []
    for number, ask in enumerate((lambda f: survives("descriptor", f), lambda f: survives("cuda_ipc", f), late_writes)):
        with tempfile.TemporaryDirectory() as folder:
            found.append(ask(f"{folder}/{number}"))
    return found


if __name__ == "__main__":
    ROLES[sys.argv[1]](*sys.argv[2:])
