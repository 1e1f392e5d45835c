"""A tier in a directory: blocks as files, of bounded size in all, that outlive the manager and may be shared."""

import asyncio
import logging
from collections.abc import Sequence

from callboard.bus import Node

from .block_file import BadBlockFile, decode, encode_prefix, file_bytes
from .folder import BlockFolder, Scan
from .host import Bytes
from .index import TierIndex
from .names import BlockName, Chain

log = logging.getLogger("callboard.tiers")

REFRESH_S = 10.0
"""How often it is looked what others have put into the directory, or removed; less often where looking takes long."""
REFRESH_SHARE = 0.01
"""The most of its time that the thread spends on that."""
UNSEEN_SHARE = 1 / 16
"""It is looked earlier after so much of the tier's size was written: others may write as much."""


class DiskTier:
    """The files of blocks of one chain, in a directory of at most ``most_bytes`` in all, others' blocks included.

    Reading and writing have a thread each: a write that the disk holds up holds up no read. What goes wrong on the
    disk is a warning, and a block that is not there; nothing is raised but by ``write``.
    """

    def __init__(self, node: Node, path: str, most_bytes: int, chain: Chain) -> None:
        self.index = TierIndex(most_bytes, chain.root)
        self.file_bytes = file_bytes(chain.layout, chain.fingerprint)
        self.refresh_at = 0.0
        """When ``refresh`` should be called next, on the node's clock."""
        self.num_bad = 0
        """Files that were not what their names said."""
        self._node = node
        self._chain = chain
        self._folder = BlockFolder(path)
        self._reader, self._writer = node.worker(), node.worker()
        self._warned: set[str] = set()
        self._is_open = False
        self._unseen_bytes = 0

    def __contains__(self, name: BlockName) -> bool:
        return name.key in self.index

    async def refresh(self) -> None:
        """See what is in the directory, and keep it within its size; open or make it if need be."""
        clock = self._node.clock
        begin_s = clock.now()
        try:
            scan = await self._writer.run(_scan, self._folder, clock.wall(), is_open=self._is_open)
            self._is_open = True
            self._warned.discard("open")
            self._take(scan)
            victims = self.index.make_room(0)
            if victims:
                await self._writer.run(self._folder.remove, victims)
        except OSError as error:
            self._is_open = False
            self.index.clear()
            self._warn("open", f"the tier at {self._folder.path} cannot be used: {error}")
        now = clock.now()
        self._unseen_bytes = 0
        self.refresh_at = now + max(REFRESH_S, (now - begin_s) / REFRESH_SHARE)

    async def read(self, names: Sequence[BlockName]) -> list[memoryview]:
        """Return the bytes of these blocks, up to the first that is not to be had."""
        if not self._is_open:
            return []
        files = [(name.key, name.parent) for name in names]
        found, missing = await self._reader.run(_read, self._folder, self._chain, names, self.file_bytes)
        self.index.touch(key for key, _ in files[: len(found)])
        if missing is not None:
            name = names[len(found)]
            self.index.remove(name.key)
            if missing:
                self.num_bad += 1
                self._warn("bad", f"a block at {self._folder.path} is ignored: {missing}")
        return found

    async def write(self, name: BlockName, data: Bytes) -> int:
        """Write a block; return the bytes written: 0 if it was there, or there is no room but for its own prefix.

        Raises OSError: then it is not there.
        """
        if not self._is_open:
            raise FileNotFoundError(f"{self._folder.path} is not open")
        victims = self.index.make_room(self.file_bytes, name.parent)
        if not self.index.fits(self.file_bytes):
            await self._writer.run(self._folder.remove, victims)
            return 0
        part = self._node.new_id()
        try:
            is_new = await self._writer.run(_write, self._folder, self._chain, name, data, victims, part)
        except OSError as error:
            self._warn("write", f"a block cannot be written to {self._folder.path}: {error}")
            # Perhaps the directory is another one by now: it is looked at before the next write.
            self.refresh_at = min(self.refresh_at, self._node.clock.now())
            raise
        self._warned.discard("write")
        self.index.add(name.key, name.parent, self.file_bytes)
        if not is_new:
            return 0
        self._unseen_bytes += self.file_bytes
        if self._unseen_bytes > self.index.most_bytes * UNSEEN_SHARE:
            self.refresh_at = min(self.refresh_at, self._node.clock.now())
        return self.file_bytes

    async def close(self, seconds: float) -> None:
        """Close the directory once nothing reads or writes there any more; leave it if that takes longer."""
        self._is_open = False
        try:
            async with asyncio.timeout(seconds):
                await self._reader.run(int)
                await self._writer.run(self._folder.close)
        except TimeoutError:
            pass
        finally:
            self._reader.close()
            self._writer.close()

    def _take(self, scan: Scan) -> None:
        """Bring the index to what was found."""
        present = {each.key for each in scan.found}
        for key in self.index:
            if key not in present:
                self.index.remove(key)
        for each in scan.found:
            if each.key not in self.index:
                self.index.add(each.key, each.parent, each.num_bytes)
        if scan.num_foreign:
            are = "file is" if scan.num_foreign == 1 else "files are"
            self._warn("foreign", f"{scan.num_foreign} {are} no block's in {self._folder.path}, and left alone")

    def _warn(self, kind: str, sentence: str) -> None:
        """Say it once, and again only after it was well in between."""
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning("%s", sentence)


# ---- in a thread ---------------------------------------------------------------------------------------------------


def _scan(folder: BlockFolder, wall: float, *, is_open: bool) -> Scan:
    if not is_open or folder.is_gone():
        folder.open()
    return folder.scan(wall)


def _read(
    folder: BlockFolder, chain: Chain, names: Sequence[BlockName], num_bytes: int
) -> tuple[list[memoryview], str | None]:
    """Return the blocks up to the first that cannot be had, and then why; empty if it is merely not there."""
    found: list[memoryview] = []
    for name in names:
        try:
            content = folder.read(name, num_bytes)
            if content is None:
                return found, ""
            found.append(decode(chain, name, memoryview(content)))
        except (BadBlockFile, OSError) as error:
            folder.remove([(name.key, name.parent)])
            return found, str(error)
        folder.touch([(name.key, name.parent)])
    return found, None


def _write(
    folder: BlockFolder,
    chain: Chain,
    name: BlockName,
    data: Bytes,
    victims: Sequence[tuple[bytes, bytes]],
    part: str,
) -> bool:
    folder.remove(victims)
    with memoryview(data) as view:
        return folder.write(name, (encode_prefix(chain, name, view), view), part)
