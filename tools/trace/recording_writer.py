"""Writing a recording: append only, in whole chunks, bounded by rotation."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from callboard.actors.protocol import Counters, Entry, Load
from callboard.bus.taps import TapRecord
from callboard.tools.errors import CliError
from callboard.tools.units import format_size

from .event import Event
from .recording import (
    MOST_CHUNK_BYTES,
    Batch,
    Chunk,
    End,
    FleetView,
    Header,
    Noticed,
    file_head,
    pack_chunk,
)

CHUNK_BYTES = 128 << 10
"""Records are gathered up to this size; then, and at every flush, they are written."""
VIEW_S = 10.0
"""How often it is noted how busy everybody in the fleet is."""
LEAST_SIZE = 64 << 10
SAME_S = 1e-6
"""Clocks that differ by less are the same: sums of floats are not exact."""
RECORD_BYTES = 100
"""Of a record beside its texts, facts and body; an estimate."""


class CannotWrite(CliError):
    """The recording cannot be begun, or not be continued; what was written of it is whole."""


def _lasting(entries: tuple[Entry, ...]) -> list[Entry]:
    """Return entries without what changes all the time."""
    return [msgspec.structs.replace(entry, load=Load(), counters=Counters()) for entry in entries]


class _Pending:
    """Records of one node that are gathered, and what its clock is."""

    def __init__(self, offset_s: float, error_s: float, wall_s: float) -> None:
        self.offset_s = offset_s
        self.error_s = error_s
        self.wall_s = wall_s
        self.records: list[TapRecord] = []
        self.num_bytes = 0

    def takes(self, offset_s: float, error_s: float, wall_s: float, num_bytes: int) -> bool:
        """Return whether a record fits: its clock is the same, and there is room."""
        return (
            self.num_bytes + num_bytes <= CHUNK_BYTES
            and abs(offset_s - self.offset_s) <= SAME_S
            and error_s == self.error_s
            and abs(wall_s - self.wall_s) <= 100 * SAME_S
        )


class RecordingWriter:
    """Writes one recording. ``max_bytes`` and ``num_files`` bound it: the oldest file goes when another is begun.

    Use as a context: leaving it closes the file in order. Raises CannotWrite.
    """

    def __init__(
        self,
        path: Path,
        header: Header,
        *,
        max_bytes: int = 256 << 20,
        num_files: int = 4,
        now: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self.path = path
        self.header = header
        self.num_records = 0
        self.num_lost = 0
        self.num_bytes = 0
        """Written, in files since removed too."""
        self.num_removed = 0
        """Files that made room for newer ones."""
        self._max_bytes = max(max_bytes, LEAST_SIZE)
        self._num_files = max(1, num_files)
        self._now = now
        self._wall = wall
        self._fd: int | None = None
        self._size = 0
        self._part_records = 0
        self._part_lost = 0
        self._view: FleetView | None = None
        self._pending: dict[str, _Pending] = {}
        """Records that are not written yet, by node."""
        for taken in self._paths():
            if taken.exists():
                raise CannotWrite(f"{taken} is there already: remove it, or record into another file")
        self._begin(header)

    def __enter__(self) -> "RecordingWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close("stopped")

    # ---- what is recorded ----------------------------------------------------------------------------------------

    def add(self, events: Iterable[Event]) -> None:
        """Take records in; they are in the file at the next ``flush``, or sooner."""
        for event in events:
            record, node = event.record, event.node
            offset_s, wall_s = event.time - record.time, event.wall - event.time
            num_bytes = RECORD_BYTES + len(record.facts) + len(record.body)
            if num_bytes > MOST_CHUNK_BYTES // 2:
                self.notice("too_long", node, f"the body of a {record.name} of {format_size(num_bytes)} was not kept")
                record, num_bytes = msgspec.structs.replace(record, body=msgspec.Raw(b"\xc0")), RECORD_BYTES
            pending = self._pending.get(node)
            if pending is not None and not pending.takes(offset_s, event.error_s, wall_s, num_bytes):
                self._write_batch(node)
                pending = None
            if pending is None:
                pending = self._pending[node] = _Pending(offset_s, event.error_s, wall_s)
            pending.records.append(record)
            pending.num_bytes += num_bytes

    def notice(self, kind: str, node: str, text: str, num_lost: int = 0) -> None:
        """Note what happened to the recording: who came and went, what was lost."""
        self._write_pending()
        self.num_lost += num_lost
        self._part_lost += num_lost
        self._write(Noticed(self._now(), kind, node, text, num_lost))

    def view(self, entries: tuple[Entry, ...]) -> None:
        """Note who is in the fleet, if that has changed, or a while ago."""
        view = FleetView(self._now(), entries)
        last = self._view
        if last is None or view.time - last.time >= VIEW_S or _lasting(last.entries) != _lasting(entries):
            self._write_pending()
            self._view = view
            self._write(view)

    def flush(self) -> None:
        """Write what was gathered."""
        self._write_pending()

    def close(self, reason: str) -> None:
        """End the file in order, and have it on the disk. A repeat does nothing."""
        if self._fd is None:
            return
        try:
            self._write_pending()
            self._end(reason)
        finally:
            fd, self._fd = self._fd, None
            if fd is not None:
                os.close(fd)

    # ---- files ---------------------------------------------------------------------------------------------------

    def _paths(self) -> list[Path]:
        """All files that this recording may come to have, the newest first."""
        return [self.path, *(self.path.with_name(f"{self.path.name}.{n}") for n in range(1, self._num_files))]

    def _begin(self, header: Header) -> None:
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
            self._fd = os.open(self.path, flags, 0o600)
        except OSError as error:
            raise CannotWrite(f"cannot write {self.path}: {error.strerror}") from None
        self._size = self._part_records = self._part_lost = 0
        self._write_bytes(file_head() + pack_chunk(header))

    def _rotate(self) -> None:
        self._end("rotated")
        assert self._fd is not None
        os.close(self._fd)
        self._fd = None
        paths = self._paths()
        try:
            if paths[-1].exists():
                paths[-1].unlink()
                self.num_removed += 1
            for older, newer in reversed(list(zip(paths[1:], paths, strict=False))):
                if newer.exists():
                    newer.rename(older)
        except OSError as error:
            raise CannotWrite(f"cannot rotate {self.path}: {error.strerror}") from None
        self.header = msgspec.structs.replace(self.header, part=self.header.part + 1, wall=self._wall())
        self._begin(self.header)
        if self._view is not None:
            self._write_bytes(pack_chunk(self._view))

    def _end(self, reason: str) -> None:
        self._write_bytes(pack_chunk(End(self._now(), reason, self._part_records, self._part_lost)))
        assert self._fd is not None
        os.fsync(self._fd)

    def _write_pending(self) -> None:
        for node in list(self._pending):
            self._write_batch(node)

    def _write_batch(self, node: str) -> None:
        pending = self._pending.pop(node)
        self._write(Batch(node, pending.offset_s, pending.error_s, pending.wall_s, tuple(pending.records)))
        self.num_records += len(pending.records)
        self._part_records += len(pending.records)

    def _write(self, chunk: Chunk) -> None:
        try:
            data = pack_chunk(chunk)
        except ValueError:  # A directory of thousands: the recording does without its view.
            self.notice("too_long", "", f"a {type(chunk).__name__} was longer than a recording can hold")
            return
        if self._size + len(data) > self._max_bytes:
            self._rotate()
        self._write_bytes(data)

    def _write_bytes(self, data: bytes) -> None:
        """Append a whole chunk, or nothing."""
        assert self._fd is not None, "the recording is open"
        num_written = 0
        try:
            while num_written < len(data):
                num_written += os.write(self._fd, data[num_written:])
        except OSError as error:
            fd, self._fd = self._fd, None
            try:
                os.ftruncate(fd, self._size)
            except OSError:
                pass  # The reader finds that it is cut off.
            os.close(fd)
            kept = f"{self.num_records} records are in it"
            raise CannotWrite(f"cannot go on writing {self.path}: {error.strerror}; {kept}") from None
        self._size += len(data)
        self.num_bytes += len(data)
