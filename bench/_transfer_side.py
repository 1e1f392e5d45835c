"""One process of one side of bench/transfer.py: ``_transfer_side.py SIDE ROLE CORES SOURCE_FD TARGET_FD FOLDER FACTS``.

ROLE is near or far; CORES are the cores to stay on, with commas; FACTS is what the far end has said of itself.
"""

import ctypes
import importlib
import os
import signal
import sys

from _transfer_job import Setup

MODULES = {
    "shared pool": "shared_pool",
    "shm": "kv_managers",
    "ucx": "kv_managers",
    "memcpy": "memory_copy",
    "memcpy of pages": "memory_copy",
    "process_vm_readv": "process_vm",
    "ZeroMQ": "zmq_tcp",
    "gloo": "gloo_tcp",
    "NIXL": "nixl_ucx",
    "NIXL packed": "nixl_ucx",
}


def main() -> None:
    side, role, cores, source, target, folder, facts = sys.argv[1:]
    os.sched_setaffinity(0, [int(core) for core in cores.split(",")])
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing stays behind, however the run ends.
    setup = Setup(side, int(source), int(target), folder, facts)
    module = importlib.import_module(f"_transfer_peers.{MODULES[side]}")
    (module.near if role == "near" else module.far)(setup)


if __name__ == "__main__":
    main()
