"""What only one user may touch: the directories of sockets, and the files of keys.

Connecting to a unix socket is leave to speak to a fleet, and a path that somebody else may write is one where somebody
else may listen: so sockets lie in directories of mode 0700.
"""

import os
import stat
from pathlib import Path


def why_open(path: Path, found: os.stat_result) -> str:
    """Return what lets other users at a file or directory, and the remedy; empty where nothing does."""
    mode = stat.S_IMODE(found.st_mode)
    wanted = "700" if stat.S_ISDIR(found.st_mode) else "600"
    if mode & stat.S_ISVTX:
        return f"{path} is shared by all users: use a directory of your own, of mode 0700"
    if found.st_uid != os.geteuid():
        return f"{path} belongs to another user (uid {found.st_uid}): use one of your own"
    if mode & 0o077:
        return f"{path} is open to other users (mode {mode:04o}): run chmod {wanted} {path}"
    return ""


def make_private(folder: Path) -> None:
    """Make a directory that only this user may enter, or see that it is one. Raises PermissionError, OSError."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if reason := why_open(folder, folder.stat()):
        raise PermissionError(reason)
