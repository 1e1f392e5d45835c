"""One process of one side of bench/bus.py: ``_bus_side.py SIDE ROLE CORES ADDRESS [PIDS]``.

ROLE is server, client or broker; CORES are the cores to stay on, with commas; PIDS the other processes of the side,
whose processor time the client adds to its own.
"""

import ctypes
import importlib
import os
import signal
import sys

MODULES = {
    "floor": "floor",
    "limit": "limit",
    "callboard": "callboard_bus",
    "grpc": "grpc_aio",
    "fastapi": "fastapi_http",
    "nats": "nats_broker",
}


def main() -> None:
    side, role, cores, address, *pids = sys.argv[1:]
    os.sched_setaffinity(0, [int(core) for core in cores.split(",")])
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing stays behind, however the run ends.
    module = importlib.import_module(f"_bus_peers.{MODULES[side]}")
    if role == "client":
        module.client(address, [os.getpid(), *map(int, pids)])
    elif role == "server":
        module.serve(address)
    else:
        module.broker(address)


if __name__ == "__main__":
    main()
