"""A fleet's run directory: its lock, its state file, its sockets and logs.

The lock says whether the fleet lives: the launcher takes it and every process of the fleet inherits it, so that it is
free only when the last of them has ended. It lies in the directory and is removed last: whoever takes a lock must
look whether it still is the one in the directory.
"""

import fcntl
import os
import shutil
from pathlib import Path

LOCK = "lock"


def try_lock(folder: Path) -> int | None:
    """Make ``folder`` (0700) and take its lock; return the lock's descriptor, None while somebody else has it."""
    while True:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # The directory was removed in between.
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        if _is_the_lock(fd, folder):
            return fd
        os.close(fd)


def is_locked(folder: Path) -> bool:
    """Say whether any process of the fleet in ``folder`` lives."""
    try:
        fd = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _is_the_lock(fd: int, folder: Path) -> bool:
    try:
        named = os.stat(folder / LOCK)
    except FileNotFoundError:
        return False
    own = os.fstat(fd)
    return (own.st_dev, own.st_ino) == (named.st_dev, named.st_ino)


def clear_run_dir(folder: Path) -> None:
    """Remove everything in ``folder`` but its lock."""
    for path in folder.glob("*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK:
            path.unlink(missing_ok=True)


def remove_run_dir(folder: Path) -> None:
    """Remove ``folder`` while holding its lock. A successor may take the directory over from the moment it goes."""
    clear_run_dir(folder)
    try:
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()
    except OSError:
        pass  # A successor has moved in.
