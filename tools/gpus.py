"""The GPUs of this machine, for engines on ``cuda:N``; found without torch, which takes seconds to load."""

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from callboard.kv.cuda_driver import CudaError, Gpu, cuda_driver
from callboard.kv.device_store import cuda_ordinal

from .fleet_file import Fleet
from .units import format_size

GPU_PROCESS_BYTES = 1 << 30
"""What an engine takes of a GPU beside its weights: a context, libraries' workspaces, what a step computes with."""
GPU_MANAGER_BYTES = 600 << 20
"""What a KV manager takes of a GPU beside its pool: a context."""
HOST_PROCESS_BYTES = 2 << 30
"""What an engine on a GPU takes of the machine's memory, mostly CUDA's libraries. Estimated: no GPU has run one yet."""


@dataclass(frozen=True, slots=True)
class Gpus:
    """The GPUs that can be used here, by ordinal; ``problem`` is why there are none."""

    found: tuple[Gpu, ...] = ()
    problem: str = "this machine was not searched for any"


NO_GPUS = Gpus()


def find_gpus() -> Gpus:
    """Look for GPUs, and for what an engine on one needs."""
    try:
        found = cuda_driver().gpus()
    except CudaError as error:
        devices = sorted(str(path) for path in Path("/dev").glob("nvidia[0-9]*"))
        there = f"there is a GPU ({', '.join(devices)}), but " if devices else ""
        return Gpus(problem=f"{there}{error}")
    if not found:
        return Gpus(problem="the driver shows none to this process (is CUDA_VISIBLE_DEVICES set?)")
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return Gpus(problem="torch is not installed here")
    if version.endswith("+cpu"):
        return Gpus(problem=f"the torch installed here ({version}) is built for CPUs only")
    if importlib.util.find_spec("triton") is None:
        return Gpus(problem='Triton is not installed here: run pip install "callboard[gpu]"')
    return Gpus(found, "")


def gpus_for(fleet: Fleet) -> Gpus:
    """Look for GPUs if an engine of the fleet is to run on one."""
    return find_gpus() if any(engine.device.startswith("cuda") for engine in fleet.engine) else NO_GPUS


def why_not_on(device: str, gpus: Gpus) -> str | None:
    """Return why there can be no engine on ``cuda:N`` here; None if there can."""
    ordinal = cuda_ordinal(device)
    if ordinal is None:
        return f'"{device}" is no device: write "cuda:0" for the first GPU, "cuda:1" for the second'
    if gpus.problem:
        return f'device = "{device}": no GPU can be used here ({gpus.problem}): write device = "cpu:0"'
    if ordinal >= len(gpus.found):
        names = ", ".join(f"cuda:{gpu.ordinal} ({gpu.name})" for gpu in gpus.found)
        return f'device = "{device}": there is no such GPU here, write one of {names}'
    return None


def gpu_of(device: str, gpus: Gpus) -> Gpu | None:
    """Return the GPU of ``cuda:N``; None if the device is no GPU."""
    ordinal = cuda_ordinal(device)
    return None if ordinal is None else gpus.found[ordinal]


def why_too_full(gpu: Gpu, device: str, *, pool: int, weights: int, num_engines: int) -> str | None:
    """Return why a pool, engines and their weights (bytes) do not fit onto a GPU; None if they do."""
    others = weights + num_engines * GPU_PROCESS_BYTES + GPU_MANAGER_BYTES
    if pool + others <= gpu.num_bytes:
        return None
    return (
        f"{device} ({gpu.name}) has {format_size(gpu.num_bytes)}; a pool of {format_size(pool)} does not go beside "
        f"{num_engines} engines, which take about {format_size(others)} with their weights ({format_size(weights)}): "
        "lower size in [defaults.kv]"
    )
