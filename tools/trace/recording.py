"""A recording: the messages of a fleet, kept in a file that can be read whatever happened to whoever wrote it.

A file is a magic, a version, and chunks. Each chunk says how long it is and what its checksums are, and is whole or
it is not: what a killed recorder, a full disk or a bad cable leave can be read up to there, and beyond. Several
files make up a recording that rotated: FILE is the newest, FILE.1 the one before; each stands for itself.
"""

import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec

from callboard.actors.protocol import Entry
from callboard.bus.taps import TapRecord, decode_facts
from callboard.tools.errors import CliError
from callboard.tools.units import format_size

from .event import Event, event_of

MAGIC = b"\x89CBREC\r\n"
"""Not text: a copy that changed line ends, or cut off eighth bits, is no recording any more."""
VERSION = 1
_FILE_HEAD = struct.Struct("<8sH")
MARK = b"\xc1CBK"
"""Begins a chunk: 0xc1 is the one byte that msgpack never uses."""
_CHUNK_HEAD = struct.Struct("<4sBIIII")
"""The mark, how it is stored, bytes stored, bytes of the payload, CRC-32 of what is stored, CRC-32 of all before."""
CHUNK_HEAD_BYTES = _CHUNK_HEAD.size
MOST_CHUNK_BYTES = 4 << 20
"""Of a payload. A reader holds one chunk at a time, and refuses longer ones."""
MOST_PARTS = 1000
RAW, ZLIB = 0, 1
_SCAN_BYTES = 1 << 16


# ---- what is in the chunks -----------------------------------------------------------------------------------------


class Header(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Opens every file of a recording. ``part`` counts them from 0."""

    recording_id: str
    part: int
    fleet: str
    callboard: str
    """The version that wrote it."""
    wall: float
    """Seconds since 1970 when this file was begun."""
    bodies: Literal["none", "hashed", "full"]


class FleetView(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Who was in the fleet by ``time``, as its directory said: also those that had left it."""

    time: float
    entries: tuple[Entry, ...]


class Batch(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Records of one node, in the order it made them, with what brings its times to the recorder's clock."""

    node: str
    offset_s: float
    """Seconds to add to the node's clock for the recorder's, known to plus or minus ``error_s``."""
    error_s: float
    wall_s: float
    """Seconds from the recorder's clock to those since 1970."""
    records: tuple[TapRecord, ...]

    def events(self) -> Iterator[Event]:
        """Return the records as a reader has them."""
        for record in self.records:
            yield event_of(record, self.node, offset_s=self.offset_s, error_s=self.error_s, wall_s=self.wall_s)


class Noticed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Something that happened to the recording itself: a node came or went, records were lost."""

    time: float
    kind: str
    node: str
    text: str
    num_lost: int = 0


class End(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Closes a file in order. One without was cut off, or its recorder was killed."""

    time: float
    reason: str
    num_records: int
    num_lost: int


Chunk = Header | FleetView | Batch | Noticed | End
_decode = msgspec.msgpack.Decoder(Chunk).decode


class NotARecording(CliError):
    """There is nothing to read."""


class Damaged(CliError):
    """The recording is cut off or corrupt."""


# ---- reading -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Whole:
    """What was read of a recording so far."""

    num_records: int = 0
    num_lost: int = 0
    """Records that the recorder itself never got."""
    num_bytes: int = 0
    """Of whole chunks."""
    num_skipped: int = 0
    """Bytes that are damaged."""
    damage: str = ""
    """What was wrong first, if anything; a sentence."""


class Recording:
    """A recording to be read, as often as wanted, from the beginning, in flat memory.

    Damage raises Damaged where it is met; with ``is_partial`` it is skipped instead, and told in ``whole.damage``.
    """

    def __init__(self, path: Path, parts: tuple[Path, ...], header: Header, *, is_partial: bool) -> None:
        self.path = path
        self.parts = parts
        """The files, oldest first."""
        self.header = header
        self.is_partial = is_partial
        self.whole = Whole()
        """Of the latest reading."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(part.stat().st_size for part in self.parts)

    @property
    def events(self) -> Iterator[Event]:
        """All records, from the beginning: a node's in order, those of different nodes as they came."""
        for chunk in self.chunks():
            if isinstance(chunk, Batch):
                yield from chunk.events()

    def chunks(self) -> Iterator[Chunk]:
        """Return all chunks, from the beginning. Raises Damaged."""
        self.whole = whole = Whole()
        for part in self.parts:
            try:
                with part.open("rb") as file:
                    yield from _PartReader(file, part, whole, is_partial=self.is_partial).chunks()
            except OSError as error:
                raise NotARecording(f"cannot read {part}: {error.strerror}") from None


def read_recording(path: str | Path, *, is_partial: bool = False) -> Recording:
    """Open the recording at ``path``: with the files it was rotated from, where ``path`` is the newest.

    Raises NotARecording for what is none, or has no whole beginning.
    """
    path = Path(path)
    header = _header_of(path)
    parts, number = [path], header.part
    while number and len(parts) < MOST_PARTS:
        number -= 1
        older = path.with_name(f"{path.name}.{len(parts)}")
        try:
            found = _header_of(older)
        except NotARecording:
            break  # Rotated away, or elsewhere.
        if (found.recording_id, found.part) != (header.recording_id, number):
            break
        parts.append(older)
        header = found
    return Recording(path, tuple(reversed(parts)), header, is_partial=is_partial)


def _header_of(path: Path) -> Header:
    try:
        with path.open("rb") as file:
            first = next(_PartReader(file, path, Whole(), is_partial=False).chunks(), None)
    except FileNotFoundError:
        raise NotARecording(f"there is no recording {path}") from None
    except OSError as error:
        raise NotARecording(f"cannot read {path}: {error.strerror}") from None
    except Damaged as error:
        raise NotARecording(f"{error} (nothing at all)") from None
    assert isinstance(first, Header), "the first chunk of a file is its header"
    return first


class _Bad(Exception):
    """A chunk that is not whole; the text says why."""


class _PartReader:
    """Reads one file, from its head to its end."""

    def __init__(self, file: BinaryIO, path: Path, whole: Whole, *, is_partial: bool) -> None:
        self._file = file
        self._path = path
        self._whole = whole
        self._is_partial = is_partial

    def chunks(self) -> Iterator[Chunk]:
        self._check_file_head()
        is_first, is_ended = True, False
        while True:
            begin = self._file.tell()
            try:
                chunk = self._next()
            except _Bad as error:
                if is_first:
                    raise NotARecording(f"{self._path} is a recording whose beginning is damaged: {error}") from None
                self._damaged(str(error))
                self._skip_to_next(begin)
                continue
            if chunk is None:
                break
            if is_first != isinstance(chunk, Header):
                if is_first:
                    raise NotARecording(f"{self._path} is a recording without a beginning")
                self._damaged("it begins twice")
                continue
            self._whole.num_bytes += self._file.tell() - begin
            self._count(chunk)
            is_first, is_ended = False, isinstance(chunk, End)
            yield chunk
        if is_first:
            raise NotARecording(f"{self._path} is a recording that was cut off before anything was recorded")
        if not is_ended:
            self._damaged("it has no end, so its recorder was killed, or is recording still, or it was cut off")

    def _check_file_head(self) -> None:
        head = self._file.read(_FILE_HEAD.size)
        if not head:
            raise NotARecording(f"{self._path} is empty")
        if len(head) < _FILE_HEAD.size or not head.startswith(MAGIC):
            what = "is cut off in its first bytes" if MAGIC.startswith(head[:8]) else "is no recording"
            raise NotARecording(f'{self._path} {what}: "callboard trace record" writes them')
        _, version = _FILE_HEAD.unpack(head)
        if version != VERSION:
            raise NotARecording(
                f"{self._path} is a recording of format {version}, and this callboard reads format {VERSION}: "
                "use the callboard that wrote it"
            )
        self._whole.num_bytes += len(head)

    def _next(self) -> Chunk | None:
        """Return the next chunk, None at the end of the file. Raises _Bad; the file then stands behind the chunk."""
        head = self._file.read(CHUNK_HEAD_BYTES)
        if not head:
            return None
        how, num_stored, num_bytes, checksum = _read_chunk_head(head)
        stored = self._file.read(num_stored)
        if len(stored) < num_stored:
            raise _Bad("it is cut off")
        if zlib.crc32(stored) != checksum:
            raise _Bad("a chunk is corrupt")
        return _decode_chunk(_inflate(stored, num_bytes) if how == ZLIB else stored)

    def _count(self, chunk: Chunk) -> None:
        if isinstance(chunk, Batch):
            self._whole.num_records += len(chunk.records)
        elif isinstance(chunk, Noticed):
            self._whole.num_lost += chunk.num_lost

    def _damaged(self, why: str) -> None:
        whole = self._whole
        size = self._path.stat().st_size
        if not whole.damage:
            position = f"{whole.num_records} records, {format_size(whole.num_bytes)} of {format_size(size)}, are whole"
            whole.damage = f"{self._path} is damaged: {why}; {position}"
        if not self._is_partial:
            raise Damaged(f"{whole.damage}: --partial goes on with what is whole")

    def _skip_to_next(self, begin: int) -> None:
        """Go to the next chunk behind a bad one, which began at ``begin``."""
        after = self._file.tell()
        self._file.seek(begin)
        try:
            _, num_stored, _, _ = _read_chunk_head(self._file.read(CHUNK_HEAD_BYTES))
        except _Bad:
            self._file.seek(begin + 1)
            self._scan()
        else:
            # Its head is good, so it says where the next one begins: no byte is looked at twice.
            self._file.seek(min(after, begin + CHUNK_HEAD_BYTES + num_stored))
        self._whole.num_skipped += self._file.tell() - begin

    def _scan(self) -> None:
        """Go on to the next good head of a chunk, or to the end."""
        kept = b""
        while True:
            piece = self._file.read(_SCAN_BYTES)
            window = kept + piece
            start = self._file.tell() - len(window)
            at = window.find(MARK)
            while at >= 0 and at + CHUNK_HEAD_BYTES <= len(window):
                try:
                    _read_chunk_head(window[at : at + CHUNK_HEAD_BYTES])
                except _Bad:
                    at = window.find(MARK, at + 1)
                    continue
                self._file.seek(start + at)
                return
            if not piece:
                return
            kept = window[-(CHUNK_HEAD_BYTES - 1) :]


def _read_chunk_head(head: bytes) -> tuple[int, int, int, int]:
    if len(head) < CHUNK_HEAD_BYTES:
        raise _Bad("it is cut off")
    mark, how, num_stored, num_bytes, checksum, own = _CHUNK_HEAD.unpack(head)
    if mark != MARK or own != zlib.crc32(head[:-4]) or how not in (RAW, ZLIB):
        raise _Bad("a chunk is corrupt")
    if num_bytes > MOST_CHUNK_BYTES or num_stored > num_bytes or (how == RAW and num_stored != num_bytes):
        raise _Bad("a chunk is longer than any may be")
    return how, num_stored, num_bytes, checksum


def _inflate(stored: bytes, num_bytes: int) -> bytes:
    """Return what was deflated; never more than was announced, whatever it would become."""
    inflater = zlib.decompressobj()
    try:
        data = inflater.decompress(stored, num_bytes + 1)
    except zlib.error:
        raise _Bad("a chunk is corrupt") from None
    if len(data) != num_bytes or not inflater.eof:
        raise _Bad("a chunk is corrupt")
    return data


def _decode_chunk(data: bytes) -> Chunk:
    """Return a chunk that every reader can trust: facts are maps of scalars, times are numbers."""
    try:
        chunk: Chunk = _decode(data)
        if isinstance(chunk, Batch):
            for record in chunk.records:
                decode_facts(record.facts)
                if not math.isfinite(record.time + record.begin + record.first):
                    raise _Bad("a time is none")
            if not math.isfinite(chunk.offset_s + chunk.error_s + chunk.wall_s):
                raise _Bad("a time is none")
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise _Bad("a chunk is not understood") from None
    return chunk


def pack_chunk(chunk: Chunk, *, level: int = 1) -> bytes:
    """Return a chunk as it stands in a file. Raises ValueError if it is longer than MOST_CHUNK_BYTES."""
    data = msgspec.msgpack.encode(chunk)
    if len(data) > MOST_CHUNK_BYTES:
        raise ValueError(f"a chunk of {len(data)} bytes is too long")
    how, stored = RAW, data
    if level and len(data) >= 512:
        deflated = zlib.compress(data, level)
        if len(deflated) < len(data):
            how, stored = ZLIB, deflated
    head = _CHUNK_HEAD.pack(MARK, how, len(stored), len(data), zlib.crc32(stored), 0)[:-4]
    return head + struct.pack("<I", zlib.crc32(head)) + stored


def file_head() -> bytes:
    """Return the first bytes of every file of this format."""
    return _FILE_HEAD.pack(MAGIC, VERSION)
