"""Handing a pool's memory to other processes: its file descriptor over a unix socket in a directory of mode 0700.

Whoever may connect gets the pool; the directory's mode is what keeps strangers out.
"""

import asyncio
import os
import socket
import stat
from pathlib import Path

import msgspec

from .device_store import DeviceStore
from .layout import KvLayout
from .page_store import PageStore

MAX_PATH_BYTES = 107
"""sockaddr_un.sun_path, less its final zero (unix(7))."""


class PoolHeader(msgspec.Struct, frozen=True, array_like=True):
    """What comes with the file descriptor."""

    epoch: str
    layout: KvLayout
    num_blocks: int
    gpu: str = ""
    """The uuid of the GPU whose memory it is; empty for host memory."""
    num_bytes: int = 0
    """What is allocated on that GPU."""


class WrongPool(Exception):
    """The socket hands out another pool than was asked for: its manager has been restarted."""


class PoolServer:
    """Gives a pool's file descriptor to everybody who connects to ``path``. Use inside a running event loop."""

    def __init__(self, path: str, store: PageStore, epoch: str) -> None:
        assert store.fd is not None
        self.path = path
        self._fd = store.fd
        header = PoolHeader(epoch, store.layout, store.num_blocks)
        if isinstance(store, DeviceStore):
            header = msgspec.structs.replace(header, gpu=store.gpu, num_bytes=store.num_bytes)
        self._header = msgspec.msgpack.encode(header)
        self._socket: socket.socket | None = None

    def start(self) -> None:
        """Listen. Raises OSError if the path is too long, or its directory open to others."""
        if len(os.fsencode(self.path)) > MAX_PATH_BYTES:
            raise OSError(
                f"{self.path} is too long for a unix socket ({MAX_PATH_BYTES} bytes): use a shorter directory"
            )
        directory = Path(self.path).parent
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if stat.S_IMODE(directory.stat().st_mode) & 0o077:
            raise PermissionError(f"{directory} holds a pool's socket and must have mode 0700")
        Path(self.path).unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        self._socket.bind(self.path)
        self._socket.listen(64)
        asyncio.get_running_loop().add_reader(self._socket, self._accept)

    def close(self) -> None:
        """Stop listening. A repeat does nothing."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None
            Path(self.path).unlink(missing_ok=True)

    def _accept(self) -> None:
        assert self._socket is not None
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:
                return  # Nobody more; or one that has left again.
            with peer:
                peer.setblocking(False)
                try:
                    socket.send_fds(peer, [self._header], [self._fd])
                except OSError:
                    pass  # It has left again.


async def fetch_pool(path: str, *, epoch: str | None = None) -> PageStore:
    """Connect to a PoolServer and map its pool.

    Raises OSError if nobody answers or its GPU cannot be used here, WrongPool for another epoch.
    """
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.setblocking(False)
        await loop.sock_connect(peer, path)
        await _readable(loop, peer)
        data, fds, _, _ = socket.recv_fds(peer, 4096, 1)
    if not fds:
        raise ConnectionResetError(f"{path} handed out no pool")
    fd = fds[0]
    os.set_inheritable(fd, False)
    try:
        header = msgspec.msgpack.decode(data, type=PoolHeader)
    except msgspec.MsgspecError:
        os.close(fd)
        raise ConnectionResetError(f"{path} speaks another protocol") from None
    if epoch is not None and header.epoch != epoch:
        os.close(fd)
        raise WrongPool(f"{path} hands out the pool of epoch {header.epoch}, not {epoch}")
    if header.gpu:
        return DeviceStore.import_fd(fd, header.layout, header.num_blocks, gpu=header.gpu, num_bytes=header.num_bytes)
    return PageStore.map(fd, header.layout, header.num_blocks)


async def _readable(loop: asyncio.AbstractEventLoop, peer: socket.socket) -> None:
    ready: asyncio.Future[None] = loop.create_future()

    def on_readable() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(peer, on_readable)
    try:
        await ready
    finally:
        loop.remove_reader(peer)
