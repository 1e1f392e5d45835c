"""Logs that outlive their fleet: those of the last run that failed, one for each fleet's name, and few of them."""

import shutil
from os import O_CREAT, O_EXCL, O_WRONLY
from os import open as open_fd
from pathlib import Path

MOST_FLEETS = 10
MOST_FILE_BYTES = 1 << 20
"""What is kept of each file: its end."""
MOST_FILES = 64


def keep_logs(logs: Path, folder: Path) -> bool:
    """Keep in ``folder`` what a fleet has logged; return whether there was something, and room for it.

    What was kept there of an earlier run is removed, and so are the oldest folders beside it. All of it is for this
    user alone.
    """
    root = folder.parent
    try:
        paths = sorted(path for path in logs.glob("*.log*") if path.is_file() and path.stat().st_size)[:MOST_FILES]
        if not paths:
            return False
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700, parents=True)
        root.chmod(0o700)
        for path in paths:
            _copy_end(path, folder / path.name)
        for old in sorted(root.iterdir(), key=lambda path: path.lstat().st_mtime)[:-MOST_FLEETS]:
            shutil.rmtree(old, ignore_errors=True)
    except OSError:
        return False
    return True


def _copy_end(source: Path, target: Path) -> None:
    with source.open("rb") as reader, open(open_fd(target, O_WRONLY | O_CREAT | O_EXCL, 0o600), "wb") as writer:
        size = source.stat().st_size
        if size > MOST_FILE_BYTES:
            reader.seek(size - MOST_FILE_BYTES)
            reader.readline()  # Its beginning is missing.
        shutil.copyfileobj(reader, writer)
