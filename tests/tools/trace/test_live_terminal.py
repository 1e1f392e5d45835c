"""``callboard trace`` in a terminal, as users see it: real processes, a real fleet, and what stands on the screen."""

import codecs
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from served_fleet import ServedFleet
from waiting import PATIENCE_S

Eventually = Callable[..., None]
ESCAPE = re.compile(
    rb"\x1b\[(?P<place>\d+;\d+)H|\x1b\[[0-9;?<>=]*[ -/]*[@-~]|\x1b[\]P][^\x07\x1b]*(?:\x07|\x1b\\)"
    rb"|\x1b[ -/]*[0-OQ-Z\\^-~]"
)


class Terminal:
    """A process in a terminal of its own; what it writes is put where it says."""

    def __init__(self, place: Any, *words: str, size: tuple[int, int] = (80, 24), **variables: str) -> None:
        self._ours, theirs = pty.openpty()
        self.cells: dict[tuple[int, int], str] = {}
        self.raw = b""
        self._is_hung_up = False
        self.resize(size, theirs)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "callboard.tools.cli", *words],
            env={**place.env, "TERM": "xterm", "LANG": "C.UTF-8", **variables},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(theirs, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def resize(self, size: tuple[int, int], fd: int | None = None) -> None:
        self.cells.clear()
        fcntl.ioctl(self._ours if fd is None else fd, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))

    def _read(self) -> None:
        rest, at = b"", (0, 0)
        while not self._is_hung_up:
            # A thread that waits in read() would keep the terminal open after it was closed.
            if not select.select([self._ours], [], [], 0.05)[0]:
                continue
            try:
                data = os.read(self._ours, 65536)
            except OSError:
                return
            if not data:
                return
            self.raw += data
            rest += data
            cut = rest.rfind(b"\x1b")
            # Half an escape sequence, or half a character, waits for its other half; nothing else does.
            whole, rest = (rest[:cut], rest[cut:]) if cut >= 0 and not ESCAPE.match(rest, cut) else (rest, b"")
            begin, text = 0, codecs.getincrementaldecoder("utf-8")("ignore")
            for match in [*ESCAPE.finditer(whole), None]:
                for char in text.decode(whole[begin : match.start() if match else len(whole)]):
                    if char == "\r":
                        at = at[0], 0
                    elif char == "\n":
                        at = at[0] + 1, at[1]
                    elif char.isprintable():
                        self.cells[at] = char
                        at = at[0], at[1] + 1
                if match is not None:
                    begin = match.end()
                    if match["place"]:
                        y, x = match["place"].split(b";")
                        at = int(y) - 1, int(x) - 1
            rest = text.getstate()[0] + rest

    def screen(self) -> str:
        """What stands on it now."""
        cells = dict(self.cells)
        height = max((y for y, _ in cells), default=-1) + 1
        width = max((x for _, x in cells), default=-1) + 1
        return "\n".join("".join(cells.get((y, x), " ") for x in range(width)).rstrip() for y in range(height))

    def has(self, pattern: str) -> bool:
        return re.search(pattern, self.screen()) is not None

    def seen(self) -> str:
        return self.screen()

    def hang_up(self) -> None:
        """Close the window."""
        self._is_hung_up = True
        self._reading.join()
        os.close(self._ours)

    def press(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def end(self, wait_s: float = PATIENCE_S) -> str:
        """Wait until it has ended; return what it wrote below the screen it gave back."""
        try:
            self.process.wait(wait_s)
            self._reading.join(PATIENCE_S)  # The terminal's other end is closed by now.
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            os.close(self._ours)
        said = self.raw.rpartition(b"\x1b[?1049l")[2]
        return ESCAPE.sub(b"", said).decode().replace("\r\n", "\n")


@contextmanager
def terminal(place: Any, *words: str, **options: Any) -> Iterator[Terminal]:
    made = Terminal(place, *words, **options)
    try:
        yield made
    finally:
        if made.process.poll() is None:
            made.process.kill()
            made.process.wait()


def test_a_fleets_life_is_on_the_screen_from_its_first_request_to_its_end(place: Any, eventually: Eventually) -> None:
    fleet = ServedFleet(place)
    with terminal(place, "trace") as shown:
        eventually(lambda: shown.has("waiting for requests ..."))
        eventually(lambda: shown.has(r"fleet test · 6 actors · 0 requests · following"))
        fleet.complete("What is it that you do, and why do you do it?", request_id="first-one")
        eventually(lambda: shown.has(r"first-on +done .* 45 +8 tiny"))
        eventually(lambda: shown.has("1 prep_recv → decode, [0-9.]+ ms: found none of 45 prompt tokens"))
        assert shown.has("2 remote_send → prefill, [0-9.]+ m?s: computed 45 tokens in")
        assert shown.has("3 start_generate → decode, [0-9.]+ m?s: took over the reserved room")
        for lane in ("frontend", "main", "prefill", "└ kv-cpu0", "decode", "└ kv-cpu1"):
            assert shown.has(f"\n{lane} ")
        shown.press(b"q")
        assert shown.end() == "callboard: left test, which runs on\n"
        assert shown.process.returncode == 0
    with terminal(place, "trace", size=(120, 30)) as shown:
        eventually(lambda: shown.has("first-on +done"))
        eventually(lambda: shown.has("fleet test · 6 actors"))
        os.kill(fleet.rows()["decode"]["pid"], signal.SIGKILL)
        eventually(lambda: shown.has("decode died|decode is back"))
        eventually(lambda: shown.has("decode is back"))
        eventually(lambda: fleet.complete("And now?", request_id="after")[0] == 200)
        eventually(lambda: shown.has("after +done"))
        shown.press(b"\x03")
        shown.end()
        assert shown.process.returncode == 0
    with terminal(place, "trace") as shown:
        eventually(lambda: shown.has("Request after"))
        assert place.callboard("down").returncode == 0
        eventually(lambda: shown.has("fleet test has ended"))
        assert shown.has("1 prep_recv → decode")
        shown.press(b"q")
        shown.end()


def test_it_grows_with_its_terminal_and_writes_sixteen_colours(fleet: ServedFleet, eventually: Eventually) -> None:
    fleet.complete("Who?", request_id="growing")
    with terminal(fleet.place, "trace", size=(80, 24)) as shown:
        eventually(lambda: shown.has("Request growing"))
        shown.resize((200, 50))
        os.kill(shown.process.pid, signal.SIGWINCH)
        eventually(lambda: shown.has("prep_recv: look up the prefix cache, .* start_generate: adopt it and generate"))
        shown.press(b"x")
        eventually(lambda: shown.has("WHERE IT WENT"))
        shown.press(b"q")
        eventually(lambda: shown.has("Request growing"))
        shown.press(b"q")
        shown.end()
        colors = set(re.findall(rb"\x1b\[([0-9;]*)m", shown.raw))
        assert colors
        assert not [each for each in colors if b"38;" in each or b"48;" in each]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_it_and_gives_the_terminal_back(fleet: ServedFleet, eventually: Eventually, number: int) -> None:
    with terminal(fleet.place, "trace") as shown:
        eventually(lambda: shown.has("fleet test · 6 actors · .* · following"))
        os.kill(shown.process.pid, number)
        assert "left test" in shown.end()
        assert b"\x1b[?1049l" in shown.raw  # The screen as it was before.
        assert b"\x1b[?25h" in shown.raw  # The cursor.


def test_a_terminal_that_is_closed_ends_it(fleet: ServedFleet, eventually: Eventually) -> None:
    with terminal(fleet.place, "trace") as shown:
        eventually(lambda: shown.has("fleet test · 6 actors · .* · following"))
        shown.hang_up()
        shown.process.wait(PATIENCE_S)


def test_what_is_wrong_is_a_sentence_after_the_terminal_is_given_back(place: Any, fleet: ServedFleet) -> None:
    with terminal(place, "trace") as shown:
        assert shown.end() == 'callboard: no fleet is running: start one with "callboard up"\n'
    for words, sentence in {
        ("--request", "unknown"): 'callboard: no node remembers a request "unknown"',
        ("--actor", "decoder"): 'callboard: there is no actor "decoder": did you mean decode?',
        ("--verb", "prepare"): 'callboard: there is no verb "prepare"',
    }.items():
        with terminal(fleet.place, "trace", *words) as shown:
            assert shown.end().startswith(sentence)
            assert shown.process.returncode == 2
    done = fleet.place.callboard("trace", "--format", "live")
    assert (done.returncode, done.stderr) == (
        2,
        "callboard: the live view needs a terminal, in UTF-8: use --format text or --format jsonl\n",
    )


def test_the_past_can_be_looked_at_without_following(fleet: ServedFleet, eventually: Eventually) -> None:
    for name in ("one", "two", "three"):
        fleet.complete("Who?", request_id=name)
    with terminal(fleet.place, "trace", "--format", "live", "--no-follow", "--last", "2") as shown:
        eventually(lambda: shown.has("three +done"))
        assert shown.has("two +done")
        assert not shown.has("one +done")
        shown.press(b"q")
        shown.end()
    with terminal(fleet.place, "trace", "--request", "tw") as shown:
        eventually(lambda: shown.has("two +done"))
        assert not shown.has("three +done")
        shown.press(b"q")
        shown.end()


def test_a_recording_is_looked_at_without_a_fleet(fleet: ServedFleet, place: Any, eventually: Eventually) -> None:
    recorder = fleet.place.start("trace", "record", "a.rec")
    assert "now following" in recorder.stderr.readline()
    for name in ("one", "two"):
        fleet.complete("Who?", request_id=name)
    recorder.send_signal(signal.SIGINT)
    recorder.communicate(timeout=PATIENCE_S)
    path = str(fleet.place.folder / "a.rec")  # Seen from a place where there is no fleet.
    with terminal(place, "trace", "--from", path) as shown:
        eventually(lambda: shown.has("two +done"))
        shown.press(b"\x1b[B")
        eventually(lambda: shown.has("Request one"))
        assert shown.has("1 prep_recv → decode")
        shown.press(b"q")
        assert shown.end() == ""
    whole = Path(path).read_bytes()
    (place.folder / "b.rec").write_bytes(whole[: len(whole) * 2 // 3])
    with terminal(place, "trace", "--from", str(place.folder / "b.rec")) as shown:
        said = shown.end()
        assert shown.process.returncode == 2
        assert said.startswith("callboard: ")
        assert len(said.splitlines()) == 1
    piped = place.callboard("trace", "--from", path)
    assert (piped.returncode, len(piped.stderr.splitlines())) == (2, 1)


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}, {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}])
def test_where_it_cannot_be_drawn_there_are_lines(
    fleet: ServedFleet, eventually: Eventually, variables: dict[str, str]
) -> None:
    fleet.complete("Who?")
    with terminal(fleet.place, "trace", size=(200, 50), **variables) as shown:
        eventually(lambda: shown.has("now following test: 5 nodes"))
        assert shown.has("prep_recv")
        assert b"\x1b[?1049h" not in shown.raw
        shown.press(b"q")
        shown.end()


def test_a_picture_of_it_fetches_nothing(fleet: ServedFleet) -> None:
    fleet.complete("Who?", request_id="pictured")
    place = fleet.place
    command = [sys.executable, "-P", "-m", "callboard.tools.trace.live.picture", "live.svg", "--size", "80x24"]
    subprocess.run(command, env=place.env, cwd=place.folder, check=True, timeout=40)
    svg = (place.folder / "live.svg").read_text()
    assert "pictured" in svg
    assert "start_generate" in svg
    assert set(re.findall(r"https?://[^\"'\s)]+", svg)) == {"http://www.w3.org/2000/svg"}
    assert "url(h" not in svg
