"""The limit: memory that is copied by the processor, from one mapping to the other, and no Python in between.

``memcpy`` copies as many bytes in one piece. ``memcpy of pages`` copies the job's pages one after the other, by a
loop in C (compiled here): what a memcpy for each page can reach. Neither tells anybody of it.
"""

import ctypes
import random
import subprocess
from pathlib import Path

import numpy as np
from _transfer_job import LAYOUT, NUM_BLOCKS, NUM_ROWS, PAGE_BYTES, Job, Setup, address, follow_far, follow_near, ready

PAGES = """
#include <stddef.h>
#include <string.h>
void copy_pages(char *to, const char *from, const long *tos, const long *froms, long count, long rows, long stride,
                size_t size) {
    for (long i = 0; i < count; i++)
        for (long row = 0; row < rows; row++)
            memcpy(to + row * stride + tos[i] * size, from + row * stride + froms[i] * size, size);
}
"""
POOL_BYTES = NUM_BLOCKS * LAYOUT.block_bytes


def far(setup: Setup) -> None:
    ready()
    follow_far(lambda job: None)


def near(setup: Setup) -> None:
    stores = setup.source(), setup.target()
    source, target = map(address, stores)
    copy_pages = _compiled(Path(setup.folder)) if setup.side == "memcpy of pages" else None

    def in_one_piece(job: Job) -> None:
        rng, room = random.Random(job.seed), (POOL_BYTES - job.num_bytes) // PAGE_BYTES
        begin, to = rng.randint(0, room), rng.randint(0, room)
        ctypes.memmove(target + to * PAGE_BYTES, source + begin * PAGE_BYTES, job.num_bytes)

    def page_by_page(job: Job) -> None:
        assert copy_pages is not None
        froms, tos = (np.array(blocks, dtype=np.int64) for blocks in job.blocks())
        stride = NUM_BLOCKS * PAGE_BYTES
        copy_pages(target, source, tos.ctypes.data, froms.ctypes.data, len(tos), NUM_ROWS, stride, PAGE_BYTES)

    follow_near(page_by_page if copy_pages is not None else in_one_piece)


def _compiled(folder: Path) -> "ctypes._NamedFuncPointer":
    (folder / "pages.c").write_text(PAGES)
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", folder / "pages.so", folder / "pages.c"], check=True)
    function = ctypes.CDLL(str(folder / "pages.so")).copy_pages
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long] * 3 + [ctypes.c_size_t]
    return function
