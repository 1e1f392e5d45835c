"""A pool for as long as its manager lives: made, handed out to whoever may map it, and given up."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .device_store import DeviceStore, cuda_ordinal
from .lanes import INPROC
from .layout import KvLayout
from .page_store import PageStore
from .pool_socket import PoolServer


@dataclass(frozen=True, slots=True)
class PublishedPool:
    """A pool, and the path behind which others find it."""

    store: PageStore
    path: str


@contextmanager
def published_to_processes(
    socket_dir: str, name: str, layout: KvLayout, num_blocks: int, *, epoch: str, fd: int | None, device: str = "cpu"
) -> Iterator[PublishedPool]:
    """Hand out a memfd, inherited as ``fd`` or new, or new memory of a GPU, over a unix socket.

    Raises OSError as PoolServer and DeviceStore do.
    """
    store: PageStore
    if cuda_ordinal(device) is not None:
        store = DeviceStore.allocate(layout, num_blocks, device)
    else:
        store = PageStore.create(layout, num_blocks) if fd is None else PageStore.adopt(fd, layout, num_blocks)
    server = PoolServer(f"{socket_dir}/{name}.pool", store, epoch)
    try:
        server.start()
        yield PublishedPool(store, server.path)
    finally:
        server.close()
        store.close()


@contextmanager
def published_in_process(
    exchange: dict[str, Any], name: str, layout: KvLayout, num_blocks: int
) -> Iterator[PublishedPool]:
    """Hand out ordinary memory to the other nodes of this process. ``name`` must be unique in it."""
    path = INPROC + name
    exchange[path] = store = PageStore.in_process(layout, num_blocks)
    try:
        yield PublishedPool(store, path)
    finally:
        del exchange[path]
        store.close()
