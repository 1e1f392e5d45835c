"""A pool in GPU memory that other processes map, and that outlives whoever made it. No GPU has run this yet.

The memory is one allocation of CUDA's virtual memory management, passed on as a file descriptor. cuda.h promises for it
what a memfd gives a pool on CPUs: it is freed with its last handle, descriptor or mapping, in whichever process.
(cudaIpcGetMemHandle promises nothing once its exporter is gone; tests/gpu/survival.py asks both.)
"""

import os
import re
from typing import Any

from .cuda_driver import OUT_OF_MEMORY, CudaDriver, CudaError, Gpu, cuda_driver
from .layout import KvLayout
from .page_store import PageStore

DEVICE = re.compile(r"cuda:(\d{1,3})")


def cuda_ordinal(device: str) -> int | None:
    """Return N of ``cuda:N``; None for any other device."""
    match = DEVICE.fullmatch(device)
    return None if match is None else int(match[1])


class DeviceStore(PageStore):
    """The bytes of a pool on ``device``. It has no ``view``, ``slot`` or ``page``: only the GPU reads it in place.

    A process that makes a pool and hands it out pays for no context on the GPU: the memory is mapped when ``address``
    is first asked for. ``gpu`` is the GPU's uuid, ``num_bytes`` what is allocated, a little more than the pool takes.
    """

    def __init__(
        self, layout: KvLayout, num_blocks: int, driver: CudaDriver, gpu: Gpu, *, handle: int, fd: int, num_bytes: int
    ) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.device = f"cuda:{gpu.ordinal}"
        self.gpu = gpu.uuid
        self.fd: int | None = fd
        self.num_bytes = num_bytes
        self.is_closed = False
        self._half_bytes = num_blocks * layout.block_size * layout.slot_bytes
        self._driver = driver
        self._ordinal = gpu.ordinal
        self._handle: int | None = handle
        self._address: int | None = None

    @classmethod
    def allocate(
        cls, layout: KvLayout, num_blocks: int, device: str, *, driver: CudaDriver | None = None
    ) -> "DeviceStore":
        """Make a pool in new memory of ``device``. Raises CudaError, an OSError, with a sentence."""
        driver = driver or cuda_driver()
        gpu = _gpu_of(driver, device)
        if not driver.can_share(gpu.ordinal):
            raise CudaError(f"memory of {device} ({gpu.name}) cannot be shared between processes")
        step = driver.granularity(gpu.ordinal)
        num_bytes = -(-num_blocks * layout.block_bytes // step) * step
        try:
            handle = driver.create(gpu.ordinal, num_bytes)
        except CudaError as error:
            if error.code != OUT_OF_MEMORY:
                raise
            sentence = f"{device} ({gpu.name}) does not have {num_bytes >> 20} MiB free for a pool"
            raise CudaError(sentence, code=error.code) from None
        try:
            fd = driver.export_fd(handle)
        except CudaError:
            driver.release(handle)
            raise
        return cls(layout, num_blocks, driver, gpu, handle=handle, fd=fd, num_bytes=num_bytes)

    @classmethod
    def import_fd(
        cls,
        fd: int,
        layout: KvLayout,
        num_blocks: int,
        *,
        gpu: str,
        num_bytes: int,
        driver: CudaDriver | None = None,
    ) -> "DeviceStore":
        """Take over the descriptor of somebody's pool on ``gpu``, named by its uuid: not by its place in a list
        that every process may see differently.

        Raises ValueError if the memory is smaller than such a pool, CudaError if this process cannot use that GPU.
        """
        try:
            if num_bytes < num_blocks * layout.block_bytes:
                needed = num_blocks * layout.block_bytes
                raise ValueError(f"a pool of {num_blocks} blocks takes {needed} bytes, and this one has {num_bytes}")
            driver = driver or cuda_driver()
            found = next((each for each in driver.gpus() if each.uuid == gpu), None)
            if found is None:
                raise CudaError(f"the pool is on GPU {gpu}, which this process does not see")
            handle = driver.import_fd(fd)
        except (OSError, ValueError):
            os.close(fd)
            raise
        return cls(layout, num_blocks, driver, found, handle=handle, fd=fd, num_bytes=num_bytes)

    @property
    def address(self) -> int:
        """Where the pool begins in this process's addresses of the GPU; mapped now if it is not."""
        if self._address is None:
            if self._handle is None:
                raise ValueError("the pool is closed")
            self._address = self._driver.map(self._handle, self.num_bytes, self._ordinal)
        return self._address

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """The pool as bytes, for torch, Triton, ucxx, CuPy (version 3 of the interface; nobody has to synchronise)."""
        shape = (self.num_blocks * self.layout.block_bytes,)
        return {"shape": shape, "typestr": "|u1", "data": (self.address, False), "version": 3, "stream": None}

    @property
    def memory(self) -> Any:
        _ = self.address  # Whoever only asks for the interface below would not hear why there is none.
        return self

    def tensor(self) -> Any:
        """Return the pool as a torch tensor of ``layout.pool_shape(num_blocks)``; let go of it before ``close``."""
        import torch

        self._driver.enter(self._ordinal)
        flat = torch.as_tensor(self.memory, device=self.device)
        return flat.view(getattr(torch, self.layout.dtype)).view(self.layout.pool_shape(self.num_blocks))

    def copy_out(self, offset: int, out: memoryview) -> None:
        """Copy ``len(out)`` bytes from ``offset`` on to the host, without torch; returns when they are there."""
        assert 0 <= offset <= self.num_bytes - out.nbytes
        if out.nbytes:
            self._driver.copy_out(self.address + offset, out, self._ordinal)

    def copy_in(self, offset: int, data: memoryview) -> None:
        """Copy bytes of the host to ``offset``, without torch; returns when they are there."""
        assert 0 <= offset <= self.num_bytes - data.nbytes
        if data.nbytes:
            self._driver.copy_in(self.address + offset, data, self._ordinal)

    def close(self) -> None:
        """Give up mapping, handle and fd; no work of the GPU may be using the pool. A repeat does nothing."""
        self.is_closed = True
        if self._handle is None:
            return
        handle, self._handle = self._handle, None
        address, self._address = self._address, None
        try:
            if address is not None:
                self._driver.unmap(address, self.num_bytes)
            self._driver.release(handle)
        except CudaError:
            pass  # The context has failed, and holds this memory until the process ends.
        finally:
            if self.fd is not None:
                os.close(self.fd)
                self.fd = None


def _gpu_of(driver: CudaDriver, device: str) -> Gpu:
    ordinal, gpus = cuda_ordinal(device), driver.gpus()
    if ordinal is None or ordinal >= len(gpus):
        raise CudaError(f"there is no device {device}: this process sees {len(gpus)} GPUs")
    return gpus[ordinal]
