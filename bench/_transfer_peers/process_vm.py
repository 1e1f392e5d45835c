"""``process_vm_readv``: the kernel copies the job's pages out of the other process, 1024 at a time.

The near end is the reader here. It needs no mapping of the source, but leave to trace the process that has it.
"""

import ctypes
import os

import numpy as np
from _transfer_job import NUM_BLOCKS, NUM_ROWS, PAGE_BYTES, Job, Setup, address, follow_far, follow_near, ready

MOST_PAGES = 1024
"""IOV_MAX."""
PR_SET_PTRACER, ANY = 0x59616D61, -1


def far(setup: Setup) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_ulong(ANY))
    store = setup.source()
    ready(f"{os.getpid()} {address(store)}")
    follow_far(lambda job: None)


def near(setup: Setup) -> None:
    pid, theirs = map(int, setup.facts.split())
    store = setup.target()
    ours = address(store)
    read = ctypes.CDLL(None, use_errno=True).process_vm_readv
    pages = (ctypes.c_void_p, ctypes.c_ulong)
    read.argtypes = [ctypes.c_int, *pages, *pages, ctypes.c_ulong]
    read.restype = ctypes.c_ssize_t

    def move(job: Job) -> None:
        froms, tos = job.blocks()
        source, target = _pages(theirs, froms), _pages(ours, tos)
        for first in range(0, len(source), MOST_PAGES):
            theirs_now, ours_now = source[first : first + MOST_PAGES], target[first : first + MOST_PAGES]
            count = len(theirs_now)
            size = read(pid, ours_now.ctypes.data, count, theirs_now.ctypes.data, count, 0)
            if size != count * PAGE_BYTES:
                raise OSError(ctypes.get_errno(), f"{size} bytes of {count * PAGE_BYTES} were read")

    follow_near(move)


def _pages(base: int, blocks: list[int]) -> "np.ndarray[tuple[int, int], np.dtype[np.uint64]]":
    """Return an iovec of every page of some blocks."""
    rows = np.arange(NUM_ROWS, dtype=np.uint64) * np.uint64(NUM_BLOCKS * PAGE_BYTES)
    begins = np.uint64(base) + np.array(blocks, dtype=np.uint64)[:, None] * np.uint64(PAGE_BYTES) + rows
    pages = np.empty((begins.size, 2), dtype=np.uint64)
    pages[:, 0], pages[:, 1] = begins.reshape(-1), PAGE_BYTES
    return pages
