"""Request ids that clients chose and several frontends serve: no two requests in flight may have one.

A claim is a symbolic link in a directory of the fleet's: made by one of them alone, and it says by whom. What one that
was killed had claimed is given back when it starts again.
"""

from collections.abc import Iterable
from pathlib import Path


class ClaimedIds:
    """The ids of clients that are in flight in a fleet; ``owner`` is the frontend that this one is."""

    def __init__(self, folder: Path, owner: str) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self._folder = folder
        self._owner = owner
        self._claimed: set[str] = set()
        for path in folder.iterdir():
            try:
                if str(path.readlink()) == owner:
                    path.unlink()
            except OSError:
                pass  # Another has just given it back.

    def claim(self, ids: Iterable[str]) -> bool:
        """Claim all of ``ids``, or none: return whether nobody had one of them."""
        done: list[str] = []
        for each in ids:
            try:
                self._path(each).symlink_to(self._owner)
            except FileExistsError:
                self.release(done)
                return False
            except OSError:
                continue  # The disk is full: a request is worth more than that no other has its name.
            done.append(each)
            self._claimed.add(each)
        return True

    def release(self, ids: Iterable[str]) -> None:
        """Give ids back; those that were not claimed here are ignored."""
        for each in ids:
            if each in self._claimed:
                self._claimed.remove(each)
                self._path(each).unlink(missing_ok=True)

    def _path(self, request_id: str) -> Path:
        return self._folder / f"id-{request_id}"  # An id may be "..".
