"""The file of a recording: what is written comes back, and what is not whole is told, whatever happened to it."""

import os
import signal
import stat
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_events import ENTRY, HEADER, NIL, events, numbers, record, writer, written

from callboard.tools.errors import CliError
from callboard.tools.trace import recording as module
from callboard.tools.trace.event import Event, event_of
from callboard.tools.trace.recording import (
    MARK,
    Batch,
    Damaged,
    End,
    FleetView,
    Header,
    NotARecording,
    Noticed,
    file_head,
    pack_chunk,
    read_recording,
)
from callboard.tools.trace.recording_writer import CannotWrite, RecordingWriter


def boundaries(data: bytes) -> list[int]:
    """Where chunks begin, and where the last ends."""
    found, at = [], len(file_head())
    while at < len(data):
        found.append(at)
        at += module.CHUNK_HEAD_BYTES + module._read_chunk_head(data[at : at + module.CHUNK_HEAD_BYTES])[1]
    return [*found, at]


# ---- what is written comes back -------------------------------------------------------------------------------------


def test_what_was_recorded_is_read_again(tmp_path: Path) -> None:
    recording = read_recording(written(tmp_path / "a.rec"))
    assert recording.header == HEADER
    assert list(recording.events) == events(40)
    assert list(recording.events) == events(40)
    kinds = [type(chunk) for chunk in recording.chunks()]
    assert kinds == [Header, FleetView, Batch, Batch, Batch, Batch, Noticed, End]
    assert recording.whole.num_records == 40
    assert recording.whole.num_lost == 3


def test_the_file_is_for_its_owner_alone_and_is_not_overwritten(tmp_path: Path) -> None:
    path = written(tmp_path / "a.rec")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    with pytest.raises(CannotWrite, match=r"a\.rec is there already"):
        writer(path)
    assert path.read_bytes() == before


def test_records_of_several_nodes_keep_each_nodes_order(tmp_path: Path) -> None:
    given = [event for pair in zip(events(30), events(30, 100, node="decode"), strict=True) for event in pair]
    with writer(tmp_path / "a.rec") as file:
        file.add(given)
    read = list(read_recording(tmp_path / "a.rec").events)
    for node in ("control", "decode"):
        assert [event for event in read if event.node == node] == [event for event in given if event.node == node]


def test_a_clock_that_is_corrected_begins_a_batch_of_its_own(tmp_path: Path) -> None:
    given = [*events(3), *(event_of(record(n), "control", offset_s=5.002, error_s=1e-4) for n in range(3, 6))]
    with writer(tmp_path / "a.rec") as file:
        file.add(given)
    read = list(read_recording(tmp_path / "a.rec").events)
    assert [event.time for event in read] == pytest.approx([event.time for event in given], abs=1e-9)
    assert [event.error_s for event in read] == [event.error_s for event in given]


def test_a_body_that_is_too_long_is_left_out_and_noticed(tmp_path: Path) -> None:
    body = msgspec.msgpack.encode({"prompt": bytes(3 << 20)})
    with writer(tmp_path / "a.rec") as file:
        file.add(events(1, body=body))
    recording = read_recording(tmp_path / "a.rec")
    [event] = recording.events
    assert event.record.body == NIL
    [notice] = [chunk for chunk in recording.chunks() if isinstance(chunk, Noticed)]
    assert "3.0 MiB was not kept" in notice.text


# ---- rotation -------------------------------------------------------------------------------------------------------


def noise(number: int) -> bytes:
    """A body that does not compress."""
    words = [zlib.crc32(f"{number}/{n}".encode()).to_bytes(4, "little") for n in range(1000)]
    return msgspec.msgpack.encode({"prompt": b"".join(words)})


def test_a_recording_stays_within_its_bound_and_each_file_stands_for_itself(tmp_path: Path) -> None:
    with writer(tmp_path / "a.rec", max_bytes=100_000, num_files=3) as file:
        file.view((ENTRY,))
        write_noise(file, 200)
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == ["a.rec", "a.rec.1", "a.rec.2"]
    assert all(path.stat().st_size <= 101_000 and stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)
    read = numbers(read_recording(tmp_path / "a.rec"))
    assert read == list(range(read[0], 200))
    assert len(read) > 45
    alone = read_recording(tmp_path / "a.rec.2")
    assert numbers(alone) == read[: len(numbers(alone))]
    assert [type(chunk) for chunk in alone.chunks()][:2] == [Header, FleetView]


def test_older_files_of_another_recording_are_neither_read_nor_moved(tmp_path: Path) -> None:
    written(tmp_path / "b.rec")
    (tmp_path / "b.rec").rename(tmp_path / "a.rec.1")
    with pytest.raises(CannotWrite, match=r"a\.rec\.1 is there already"):
        writer(tmp_path / "a.rec")
    written(tmp_path / "a0.rec", 10).rename(tmp_path / "a.rec")
    assert len(numbers(read_recording(tmp_path / "a.rec"))) == 10


# ---- damage ---------------------------------------------------------------------------------------------------------


def test_a_file_cut_off_anywhere_says_what_is_whole_and_gives_it(tmp_path: Path) -> None:
    path = written(tmp_path / "a.rec")
    data = path.read_bytes()
    [first, *rest] = boundaries(data)
    for length in range(len(data)):
        path.write_bytes(data[:length])
        whole_chunks = max(sum(end <= length for end in rest), 0)
        num_whole = 10 * min(max(whole_chunks - 2, 0), 4)
        try:
            recording = read_recording(path)
        except NotARecording:
            assert length < rest[0], length
            continue
        with pytest.raises(Damaged, match=rf"{num_whole} records, .* are whole: --partial goes on with what is whole"):
            numbers(recording)
        partial = read_recording(path, is_partial=True)
        assert numbers(partial) == list(range(num_whole))
        assert "is damaged" in partial.whole.damage
    assert first == len(file_head())


def test_behind_a_corrupt_chunk_the_partial_reader_goes_on(tmp_path: Path) -> None:
    path = written(tmp_path / "a.rec")
    data = path.read_bytes()
    for begin, end in list(pairwise(boundaries(data)))[2:6]:
        for at in (begin, begin + 5, begin + module.CHUNK_HEAD_BYTES, end - 1):
            broken = bytearray(data)
            broken[at] ^= 0x40
            path.write_bytes(broken)
            with pytest.raises(Damaged, match="a chunk is corrupt"):
                numbers(read_recording(path))
            partial = read_recording(path, is_partial=True)
            assert len(numbers(partial)) == 30
            assert 0 < partial.whole.num_skipped <= end - begin


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is empty"),
        (b"{}", 'is no recording: "callboard trace record" writes them'),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "is no recording"),
        (file_head()[:5], "is cut off in its first bytes"),
        (file_head(), "was cut off before anything was recorded"),
        (file_head()[:8] + b"\x07\x00" + bytes(50), "is a recording of format 7, and this callboard reads format 1"),
        (file_head() + bytes(50), "whose beginning is damaged"),
        (file_head() + pack_chunk(End(0.0, "", 0, 0)), "without a beginning"),
    ],
)
@pytest.mark.parametrize("is_partial", [False, True])
def test_what_is_no_recording_is_refused_in_one_sentence(
    tmp_path: Path, data: bytes, sentence: str, is_partial: bool
) -> None:
    (tmp_path / "a.rec").write_bytes(data)
    with pytest.raises(NotARecording) as caught:
        read_recording(tmp_path / "a.rec", is_partial=is_partial)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_file_and_no_file_at_all_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(NotARecording, match="there is no recording"):
        read_recording(tmp_path / "none.rec")
    with pytest.raises(NotARecording, match="Is a directory"):
        read_recording(tmp_path)


# ---- hostile files --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return written(tmp_path_factory.mktemp("valid") / "a.rec").read_bytes()


def read_all(path: Path) -> list[Event]:
    """Everything a reader can meet; only a CliError may come of it."""
    found: list[Event] = []
    for is_partial in (False, True):
        try:
            recording = read_recording(path, is_partial=is_partial)
            found = list(recording.events)
        except CliError as error:
            sentence = str(error)
        else:
            continue
        assert "\n" not in sentence
    return found


def identity(event: Event) -> bytes:
    return msgspec.msgpack.encode((event.node, event.time, event.record))


@settings(max_examples=400, deadline=None)
@given(edits=st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(max_size=12), st.integers(0, 60)), max_size=5))
def test_any_mutation_gives_whole_records_or_the_sentence(
    valid: bytes, tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, bytes, int]]
) -> None:
    data = bytearray(valid)
    for at, new, num_old in edits:
        at %= len(data) + 1
        data[at : at + num_old] = new
    path = tmp_path_factory.getbasetemp() / "mutated.rec"
    path.write_bytes(data)
    known = set(map(identity, events(40)))
    assert all(identity(event) in known for event in read_all(path))


@settings(max_examples=300, deadline=None)
@given(payload=st.binary(max_size=300), is_deflated=st.booleans())
def test_a_chunk_with_good_sums_and_any_payload_harms_nobody(
    valid: bytes, tmp_path_factory: pytest.TempPathFactory, payload: bytes, is_deflated: bool
) -> None:
    stored = zlib.compress(payload) if is_deflated else payload
    length = max(len(payload), len(stored))
    head = module._CHUNK_HEAD.pack(MARK, int(is_deflated), len(stored), length, zlib.crc32(stored), 0)[:-4]
    path = tmp_path_factory.getbasetemp() / "crafted.rec"
    path.write_bytes(valid + head + zlib.crc32(head).to_bytes(4, "little") + stored)
    read_all(path)


def crafted(how: int, stored: bytes, num_bytes: int) -> bytes:
    head = module._CHUNK_HEAD.pack(MARK, how, len(stored), num_bytes, zlib.crc32(stored), 0)[:-4]
    return head + zlib.crc32(head).to_bytes(4, "little") + stored


@pytest.mark.parametrize(
    "chunk",
    [
        crafted(1, zlib.compress(bytes(200 << 20)), module.MOST_CHUNK_BYTES),
        crafted(0, b"\x91" * 2_000_000, 2_000_000),
        crafted(0, b"\x96\xa5Batch\xa1x\x00\x00\x00\xdd\xff\xff\xff\xff", 19),
        crafted(0, msgspec.msgpack.encode(["Batch", "x", float("nan"), 0.0, 0.0, []]), 34),
    ],
    ids=["bomb", "nesting", "length", "nan"],
)
def test_a_hostile_chunk_costs_little(tmp_path: Path, chunk: bytes) -> None:
    path = tmp_path / "a.rec"
    path.write_bytes(file_head() + pack_chunk(HEADER) + chunk)
    tracemalloc.start()
    try:
        with pytest.raises(Damaged):
            list(read_recording(path).events)
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()


def test_a_file_of_nothing_but_marks_is_scanned_once(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    path.write_bytes(file_head() + pack_chunk(HEADER) + MARK * 500_000)
    recording = read_recording(path, is_partial=True)
    assert numbers(recording) == []
    assert recording.whole.num_skipped == 2_000_000


def test_a_long_recording_is_read_in_flat_memory(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        path = tmp_path / f"{count}.rec"
        with writer(path) as file:
            for begin in range(0, count, 500):
                file.add(events(500, begin))
        tracemalloc.start()
        try:
            assert sum(1 for _ in read_recording(path).events) == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    short, long = peak(5_000), peak(50_000)
    assert long < 1.5 * short + (1 << 20)


# ---- the end of a recorder ------------------------------------------------------------------------------------------

KILLED = """
import sys
sys.path.insert(0, {folder!r})
from pathlib import Path
from recorded_events import events, writer
file = writer(Path({path!r}))
number = 0
while True:
    file.add(events(7, number))
    file.flush()
    number += 7
    print(number, flush=True)
"""


def test_a_recorder_killed_at_any_time_leaves_whole_chunks(tmp_path: Path) -> None:
    for wanted in (1, 20, 61):
        path = tmp_path / f"{wanted}.rec"
        code = KILLED.format(folder=str(Path(__file__).parent.parent), path=str(path))
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            lines = iter(process.stdout)
            for _ in range(wanted):
                said = int(next(lines))
            os.kill(process.pid, signal.SIGKILL)
            said = max([said, *(int(line) for line in lines if line.strip())])
        with pytest.raises(Damaged, match="its recorder was killed"):
            numbers(read_recording(path))
        found = numbers(read_recording(path, is_partial=True))
        assert found[:said] == list(range(said))


def write_noise(file: RecordingWriter, count: int) -> None:
    for number in range(count):
        file.add(events(1, number, body=noise(number)))
        file.flush()


def test_a_full_disk_ends_the_recording_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    path = tmp_path / "a.rec"
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    file = writer(path)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        with pytest.raises(CannotWrite, match=r"cannot go on writing .*; \d+ records are in it"):
            write_noise(file, 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    found = numbers(read_recording(path, is_partial=True))
    assert found == list(range(len(found)))
    assert len(found) == file.num_records > 2
    assert path.stat().st_size <= 20_000


@pytest.fixture(autouse=True)
def _no_leftovers() -> Iterator[None]:
    yield
    assert not tracemalloc.is_tracing()
