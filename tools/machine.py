"""What this machine can give a fleet: cores, memory (also under a cgroup limit), a free port."""

import os
import socket
from pathlib import Path

from .errors import StartFailed

_CGROUP = Path("/sys/fs/cgroup")


def allowed_cores() -> tuple[int, ...]:
    """Return the cores this process may run on, in order."""
    return tuple(sorted(os.sched_getaffinity(0)))


def _meminfo(field: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/meminfo has no {field}")


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and int(text) < 1 << 60 else None


def _cgroup_folders() -> list[tuple[Path, str, str]]:
    """Return every memory cgroup above this process: its folder, and the names of its limit and usage files."""
    folders = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = _CGROUP, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = _CGROUP / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        folder = root / path.lstrip("/")
        while folder.is_relative_to(root):
            folders.append((folder, *names))
            folder = folder.parent
    return folders


def _reclaimable(folder: Path) -> int:
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("inactive_file ", "total_inactive_file ")))


def total_memory() -> int:
    """Return the bytes of memory this process could ever use: the machine's, or the smallest cgroup limit."""
    limits = [_number(folder / limit) for folder, limit, _ in _cgroup_folders()]
    return min([_meminfo("MemTotal"), *(limit for limit in limits if limit is not None)])


def available_memory() -> int:
    """Return the bytes of memory that can be taken now without swapping or hitting a cgroup limit."""
    available = _meminfo("MemAvailable")
    for folder, limit_name, usage_name in _cgroup_folders():
        limit, usage = _number(folder / limit_name), _number(folder / usage_name)
        if limit is not None and usage is not None:
            available = min(available, limit - usage + _reclaimable(folder))
    return max(0, available)


def split_address(http: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT`` (``[::1]:8000`` too). Raises ValueError."""
    host, colon, port = http.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f'"{http}" is no address: write for example "127.0.0.1:8000"')
    return host.strip("[]"), int(port)


def claim_port(host: str, port: int) -> int:
    """Return ``port``, or a free one for 0, once it could be bound. Raises StartFailed with a sentence."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            remedy = "pass --port N for another one (0: any free one)"
            if isinstance(error, socket.gaierror):
                raise StartFailed(f"this machine does not know the host {host}: change [listen] http") from None
            raise StartFailed(f"cannot listen on {host}:{port} ({(error.strerror or '').lower()}): {remedy}") from None
        chosen: int = probe.getsockname()[1]
    return chosen
