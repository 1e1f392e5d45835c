"""UCX between two processes on GPU memory: our wires, with tensors of the GPU in place of staging buffers.

The answer decides whether staging should lie on the GPU: each size goes from GPU to GPU memory, and from host to host
memory, over the same wire. What arrives is compared bit for bit.
"""

import asyncio
import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / ".typing"))  # There `callboard` is the repository itself.

SIZES = (1 << 20, 16 << 20, 64 << 20)
ROUNDS = 8
PLACES = ("cuda:0", "cpu")


def buffer_of(num_bytes: int, place: str, seed: int) -> Any:
    """Return a buffer as UCX takes it, of noise, or for seed 0 of zeros."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (num_bytes,), generator=generator, dtype=torch.uint8) * min(seed, 1)
    return memoryview(noise.numpy()) if place == "cpu" else noise.to(place)


def is_equal(one: Any, other: Any) -> bool:
    import torch

    return bool(one == other if isinstance(one, memoryview) else torch.equal(one, other))


async def receive(places: tuple[str, ...]) -> None:
    """Invite a sender, take what it sends, and say what arrived and how fast."""
    from callboard.kv.lanes import UcxWires

    wires = UcxWires("127.0.0.1")
    invitation = await wires.invite()
    print(invitation.address, invitation.secret.hex(), flush=True)
    await asyncio.to_thread(sys.stdin.readline)  # The sender is there; it is not waited for longer than seconds.
    tag = 1
    for place in places:
        for size in SIZES:
            buffer, seconds = buffer_of(size, place, 0), []
            for _ in range(ROUNDS):
                begin = time.perf_counter()
                await invitation.inlet.receive(tag, buffer)
                seconds.append(time.perf_counter() - begin)
                tag += 1
            holds = is_equal(buffer, buffer_of(size, place, 9))
            rate = size / sorted(seconds)[ROUNDS // 2] / 1e9
            print(place, size, holds, round(rate, 3), flush=True)
    await wires.close()


async def send(address: str, secret: str, places: tuple[str, ...]) -> None:
    """Send every size from every place."""
    from callboard.kv.lanes import UcxWires

    wires = UcxWires("127.0.0.1")
    wire = await wires.connect(address, bytes.fromhex(secret))
    print("connected", flush=True)
    tag = 1
    for place in places:
        for size in SIZES:
            buffer = buffer_of(size, place, 9)
            for _ in range(ROUNDS):
                await wire.send(tag, buffer)
                tag += 1
    sys.stdin.readline()
    await wires.close()


def rows(device: str = "cuda:0") -> list[dict[str, Any]]:
    """Return what was found."""
    if importlib.util.find_spec("ucxx") is None:
        return [{"test": "UCX on GPU memory", "skipped": "ucxx is not installed here"}]
    places = PLACES if device != "cpu" else ("cpu",)
    pipe = subprocess.PIPE
    command = [sys.executable, __file__]
    receiver = subprocess.Popen([*command, "receive", *places], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert receiver.stdout is not None
    invitation = receiver.stdout.readline().split()
    words = [*command, "send", *invitation, *places]
    sender = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert sender.stdout is not None
    sender.stdout.readline()
    try:
        out, errors = receiver.communicate("\n", timeout=50)
        sender.communicate("\n", timeout=20)
        problem = errors[-500:] if receiver.returncode else ""
    except subprocess.TimeoutExpired:
        out, problem = "", "it hung"
    finally:
        for process in (receiver, sender):
            process.kill()
            process.communicate()
    found = []
    for line in out.splitlines():
        place, size, holds, rate = line.split()
        name = f"UCX from {place} to {place} memory, {int(size) >> 20} MiB"
        found.append({"test": name, "holds": holds == "True", "GB/s": float(rate)})
    is_whole = len(found) == len(places) * len(SIZES)
    return [*found, {"test": "UCX: all sizes arrived", "holds": is_whole, "problem": problem}]


if __name__ == "__main__":
    role, *words = sys.argv[1:]
    if role == "receive":
        asyncio.run(receive(tuple(words)))
    else:
        asyncio.run(send(words[0], words[1], tuple(words[2:])))
