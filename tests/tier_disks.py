"""Disk tiers without a manager, and blocks for them."""

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from callboard.bus import Node, VirtualClock
from callboard.bus.testing import run_virtual
from callboard.bus.transports.inproc import InprocHub
from callboard.kv.layout import KvLayout
from callboard.kv.tiers import BlockName, Chain, DiskTier
from callboard.kv.tiers.block_file import file_bytes
from callboard.kv.tiers.folder import file_name
from callboard.kv.tokens import pack_tokens

LAYOUT = KvLayout(num_layers=2, num_kv_heads=1, head_dim=2, block_size=4)
CHAIN = Chain(LAYOUT, "a model")
SIZE = file_bytes(LAYOUT, "a model")


def names(begin: int, num_blocks: int, chain: Chain = CHAIN) -> list[BlockName]:
    """Return the names of a prefix of its own."""
    return list(chain.names(chain.root, pack_tokens(range(begin, begin + 4 * num_blocks)), 0))


def data_of(name: BlockName) -> bytes:
    return bytes((name.tokens[0] + i) % 256 for i in range(LAYOUT.block_bytes))


class Disks:
    """Tiers on one directory, as of managers in several processes, on a virtual clock."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "cache"
        self._hub = InprocHub()
        self._num = 0

    async def tier(self, num_blocks: int = 100, *, chain: Chain = CHAIN, path: Path | None = None) -> DiskTier:
        self._num += 1
        node = Node(f"n{self._num}", transport=self._hub.transport(), clock=VirtualClock(), seed=self._num)
        tier = DiskTier(node, str(path or self.path), num_blocks * SIZE, chain)
        await tier.refresh()
        return tier

    def file(self, name: BlockName) -> Path:
        return self.path / file_name(name.key, name.parent)

    def files(self) -> list[Path]:
        return sorted(self.path.iterdir())


async def write(tier: DiskTier, blocks: list[BlockName]) -> None:
    for name in blocks:
        await tier.write(name, data_of(name))


async def read(tier: DiskTier, blocks: list[BlockName]) -> int:
    """Read as many blocks as are there, and see that they are the right ones; return how many."""
    found = await tier.read(blocks)
    for name, data in zip(blocks, found, strict=False):
        assert data == data_of(name)
    return len(found)


def on_a_disk(test: Callable[[Disks], Awaitable[None]]) -> Callable[[Path], None]:
    """Run a test on a virtual clock, with a directory of its own."""

    def run(tmp_path: Path) -> None:
        run_virtual(lambda: test(Disks(tmp_path)))

    run.__name__ = test.__name__
    return run


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
