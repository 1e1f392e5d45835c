"""A directory of blocks' files that only this user may enter: everything that touches the disk, and nothing else.

Its functions block: they run in a thread, and share nothing with one another. Everything goes through the descriptor
of the directory, which was seen to be private: no link and no other directory put in its place leads elsewhere. A file
is whole from its first moment under its name, since it is written under another one. Others may use the directory at
the same time, and remove what they like.
"""

import os
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from callboard.bus.private import make_private, why_open

from .names import KEY_BYTES, BlockName

_KEY = f"[0-9a-f]{{{2 * KEY_BYTES}}}"
_NAME = re.compile(f"({_KEY})-({_KEY})\\.kv")
_UNFINISHED = re.compile(f"{_KEY}-{_KEY}\\.kv\\.[0-9a-f]+\\.part")
UNFINISHED_S = 300.0
"""No file takes this long to write: one that is older was left by a process that was killed."""


class NotPrivate(PermissionError):
    """A directory in which other users could read blocks, or put some; the message is a sentence for people."""


@dataclass(frozen=True, slots=True)
class Found:
    """A block's file in the directory."""

    key: bytes
    parent: bytes
    num_bytes: int
    mtime_ns: int


@dataclass(slots=True)
class Scan:
    """What is in a directory, oldest first. ``num_foreign``: names that are not of blocks, which are left alone."""

    found: list[Found] = field(default_factory=list)
    num_foreign: int = 0


def file_name(key: bytes, parent: bytes) -> str:
    """Return the name of a block's file, from which the tree of all of them can be told."""
    return f"{key.hex()}-{parent.hex()}.kv"


class BlockFolder:
    """The files of one directory. Every method may raise OSError; the directory is opened anew if it is gone."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd: int | None = None
        self._outdated: list[int] = []
        """Of directories that were removed; other threads may be using them still."""

    def open(self) -> None:
        """Open the directory, and make it if it is not there. Raises NotPrivate, OSError."""
        path = Path(self.path)
        try:
            make_private(path)
        except FileExistsError:
            raise NotADirectoryError(f"{path} is no directory") from None
        except PermissionError as error:
            raise NotPrivate(str(error)) from None
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        if reason := why_open(path, os.fstat(fd)):
            os.close(fd)
            raise NotPrivate(reason)
        if self._fd is not None:
            self._outdated.append(self._fd)
        self._fd = fd

    def close(self) -> None:
        """Close the directory, which no other thread uses any more. A repeat does nothing."""
        if self._fd is not None:
            self._outdated.append(self._fd)
            self._fd = None
        while self._outdated:
            os.close(self._outdated.pop())

    @property
    def fd(self) -> int:
        """The directory's descriptor. Raises FileNotFoundError if it is not open."""
        if self._fd is None:
            raise FileNotFoundError(f"{self.path} is not open")
        return self._fd

    def is_gone(self) -> bool:
        """Return whether the directory was removed, or another is in its place."""
        try:
            return not os.path.samestat(os.fstat(self.fd), os.stat(self.path, follow_symlinks=False))
        except OSError:
            return True

    def scan(self, wall: float) -> Scan:
        """Return what is there now, ``wall`` seconds since 1970, and remove what was left unfinished long ago."""
        scan = Scan()
        with os.scandir(self.fd) as entries:
            for entry in entries:
                match = _NAME.fullmatch(entry.name)
                if match is None and _UNFINISHED.fullmatch(entry.name) is None:
                    scan.num_foreign += 1
                    continue
                try:
                    info = entry.stat(follow_symlinks=False)
                except OSError:
                    continue  # Somebody else has removed it just now.
                if not stat.S_ISREG(info.st_mode):
                    scan.num_foreign += 1
                elif match is not None:
                    key, parent = bytes.fromhex(match[1]), bytes.fromhex(match[2])
                    scan.found.append(Found(key, parent, info.st_size, info.st_mtime_ns))
                elif info.st_mtime < wall - UNFINISHED_S:
                    self._remove(entry.name)
        scan.found.sort(key=lambda each: (each.mtime_ns, each.key))
        return scan

    def read(self, name: BlockName, most_bytes: int) -> bytearray | None:
        """Return what the file of a block holds, at most ``most_bytes`` and one; None if there is none.

        Raises OSError also for what is no file of this user's: a link, a directory, a pipe.
        """
        path = file_name(name.key, name.parent)
        try:
            # Not blocking: to open a pipe would wait for its writer.
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self.fd)
        except FileNotFoundError:
            return None
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid():
                raise PermissionError(f"{self.path}/{path} is no file of this user's")
            content = bytearray(min(info.st_size, most_bytes + 1))
            num_read = 0
            with memoryview(content) as view:
                while num_read < len(content) and (got := os.readv(fd, [view[num_read:]])):
                    num_read += got
            del content[num_read:]
            return content
        finally:
            os.close(fd)

    def write(self, name: BlockName, pieces: Sequence[bytes | bytearray | memoryview], part: str) -> bool:
        """Write a block's file, under a name made with ``part`` until it is whole; return whether it was missing.

        A file of the right size that is there already is only made the most recent one.
        """
        path, num_bytes = file_name(name.key, name.parent), sum(map(len, pieces))
        try:
            info = os.stat(path, dir_fd=self.fd, follow_symlinks=False)
            if stat.S_ISREG(info.st_mode) and info.st_size == num_bytes:
                os.utime(path, dir_fd=self.fd, follow_symlinks=False)
                return False
        except FileNotFoundError:
            pass
        unfinished = f"{path}.{part}.part"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(unfinished, flags, 0o600, dir_fd=self.fd)
        try:
            try:
                for piece in pieces:
                    with memoryview(piece) as view:
                        at = 0
                        while at < len(view):
                            at += os.write(fd, view[at:])
            finally:
                os.close(fd)
            os.rename(unfinished, path, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except BaseException:
            self._remove(unfinished)
            raise
        return True

    def touch(self, files: Iterable[tuple[bytes, bytes]]) -> None:
        """Make the files of these keys (with their parents') the most recent ones."""
        for key, parent in files:
            try:
                os.utime(file_name(key, parent), dir_fd=self.fd, follow_symlinks=False)
            except OSError:
                pass  # It is gone: whoever reads it next finds out.

    def remove(self, files: Iterable[tuple[bytes, bytes]]) -> None:
        """Remove the files of these keys (with their parents'), as far as they are there."""
        for key, parent in files:
            self._remove(file_name(key, parent))

    def _remove(self, name: str) -> None:
        try:
            os.unlink(name, dir_fd=self.fd)
        except OSError:
            pass  # Gone already, or nothing that can be removed: it is not counted on.
