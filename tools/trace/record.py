"""``callboard trace record``: follow a fleet, and keep what it says in a file."""

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from callboard.actors.trace_protocol import Bodies
from callboard.bus import BusError, Node
from callboard.bus.taps import ANSWERED, RECEIVED
from callboard.bus.tasks import Tasks
from callboard.tools.bus_client import visitor, why_not
from callboard.tools.errors import CliError
from callboard.tools.running import RunningFleet, open_fleet
from callboard.tools.units import format_size, parse_duration, parse_size

from .attach import Follower
from .event import Event
from .notice import Notice
from .recording import Header
from .recording_writer import LEAST_SIZE, RecordingWriter

FLUSH_S = 0.5
SETTLE_S = 0.5
"""How long the last records are awaited after the end: nodes tell in batches, and they are put in order."""
SALT_BYTES = 16


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to record, where to, and until when."""

    path: Path
    bodies: Bodies
    max_bytes: int
    num_files: int
    seconds: float | None
    num_requests: int | None


def run(arguments: argparse.Namespace) -> int:
    """Record until it is enough, or until Ctrl-C. Raises CliError."""
    wanted = _wanted(arguments)
    fleet = open_fleet(arguments.fleet, keys=arguments.keys)
    return asyncio.run(_record(fleet, wanted))


def _wanted(arguments: argparse.Namespace) -> Wanted:
    try:
        max_bytes = parse_size(arguments.max_size, whole=0)
        seconds = None if arguments.duration is None else parse_duration(arguments.duration)
    except ValueError as error:
        raise CliError(str(error)) from None
    if max_bytes < LEAST_SIZE:
        raise CliError(f"--max-size {arguments.max_size} is too small for a file: give at least {LEAST_SIZE >> 10}KiB")
    for name, number in (("files", arguments.files), ("requests", arguments.requests)):
        if number is not None and number < 1:
            raise CliError(f"--{name} {number} would record nothing: give at least 1")
    path = Path(arguments.file)
    return Wanted(path, arguments.prompts, max_bytes, arguments.files, seconds, arguments.requests)


async def _record(fleet: RunningFleet, wanted: Wanted) -> int:
    async with visitor(fleet) as node:
        salt = os.urandom(SALT_BYTES)  # Known to the nodes while they are followed, and never written down.
        follower = Follower(node, fleet, with_past=False, everything=True, bodies=wanted.bodies, salt=salt)
        try:
            async with follower:
                with _writer(node, fleet, wanted) as writer:
                    try:
                        await Recorder(follower, writer, wanted, node).run()
                    except CliError:
                        if not writer.num_records:
                            wanted.path.unlink(missing_ok=True)
                        raise
        except BusError as error:
            raise why_not(fleet, error) from None
    return 0


def _writer(node: Node, fleet: RunningFleet, wanted: Wanted) -> RecordingWriter:
    clock = node.clock
    header = Header(node.new_id(), 0, fleet.state.name, version("callboard"), clock.wall(), wanted.bodies)
    return RecordingWriter(
        wanted.path,
        header,
        max_bytes=wanted.max_bytes,
        num_files=wanted.num_files,
        now=clock.now,
        wall=clock.wall,
    )


class Recorder:
    """Writes down what a follower is told, until the end that was wished for."""

    def __init__(self, follower: Follower, writer: RecordingWriter, wanted: Wanted, node: Node) -> None:
        self.num_begun = 0
        self.num_ended = 0
        self._follower = follower
        self._writer = writer
        self._wanted = wanted
        self._clock = node.clock
        self._began = node.clock.now()
        self._is_enough = asyncio.Event()
        self._why = "stopped"
        self._shows = sys.stderr.isatty()

    async def run(self) -> None:
        """Record; then close the file and say what is in it. Raises CliError."""
        broken: list[BaseException] = []
        tasks = Tasks(broken.append)
        with _on_signals(lambda: self._end("stopped")):
            reading, keeping = tasks.spawn(self._read()), tasks.spawn(self._keep())
            enough = tasks.spawn(self._is_enough.wait())
            try:
                done, _ = await asyncio.wait((reading, keeping, enough), return_when=asyncio.FIRST_COMPLETED)
                if done == {enough}:
                    await asyncio.wait((reading, keeping), timeout=SETTLE_S, return_when=asyncio.FIRST_COMPLETED)
            finally:
                await tasks.cancel()
        if self._shows:
            self._clear()
        if broken:
            raise broken[0]
        self._writer.view(tuple(self._follower.entries.values()))
        self._writer.close(self._why)
        self._sum_up()

    def _end(self, why: str) -> None:
        if not self._is_enough.is_set():
            self._why = why
            self._is_enough.set()

    async def _read(self) -> None:
        async for batch in self._follower:
            events: list[Event] = []
            for item in batch:
                if isinstance(item, Notice):
                    self._notice(item)
                else:
                    events.append(item)
                    self._count(item)
            self._writer.add(events)
        self._why = "the fleet has ended"

    def _count(self, event: Event) -> None:
        record = event.record
        if record.name != "Generate":
            return
        if record.what == RECEIVED:
            self.num_begun += 1
        elif record.what == ANSWERED:
            self.num_ended += 1
            if self.num_ended == self._wanted.num_requests:
                self._end(f"{self.num_ended} requests have ended")

    def _notice(self, notice: Notice) -> None:
        if notice.kind == "without" and self._wanted.bodies == "full":
            raise CliError(f"{notice.text}, or record with --prompts hashed")
        self._writer.notice(notice.kind, notice.node, notice.text, notice.num_lost)
        is_counted = notice.kind == "lost" and self._shows
        is_nobody = notice.kind == "following" and not self._follower.nodes  # Why is told for each of them.
        if not is_counted and not is_nobody:
            self._say(notice.text)

    async def _keep(self) -> None:
        """Have what is known in the file, and show it, twice a second; end when the time is over."""
        seconds = self._wanted.seconds
        while True:
            entries = self._follower.entries
            self._writer.view(tuple(entries[name] for name in sorted(entries)))
            self._writer.flush()
            elapsed = self._clock.now() - self._began
            if self._shows:
                self._clear()
                print(
                    f"recording {self._figures()}, {elapsed:.0f} s: Ctrl-C ends it", end="", file=sys.stderr, flush=True
                )
            if seconds is not None and elapsed >= seconds:
                self._end(f"{seconds:g} s are over")
                seconds = None
            left = FLUSH_S if seconds is None else min(FLUSH_S, max(0.01, seconds - elapsed))
            await self._clock.sleep(left)

    def _figures(self) -> str:
        writer = self._writer
        lost = f", {writer.num_lost:,} lost" if writer.num_lost else ""
        requests = f"{self.num_begun:,} request{'s' * (self.num_begun != 1)}"
        return f"{requests}, {writer.num_records:,} records{lost}, {format_size(writer.num_bytes)}"

    def _clear(self) -> None:
        print("\r\x1b[K", end="", file=sys.stderr)

    def _say(self, text: str) -> None:
        if self._shows:
            self._clear()
        print(text, file=sys.stderr, flush=True)

    def _sum_up(self) -> None:
        elapsed, path = self._clock.now() - self._began, self._wanted.path
        print(f"Recorded {self._figures()} in {elapsed:.1f} s into {path}: {self._why}.")
        if self._writer.num_removed:
            print(f"The oldest {self._writer.num_removed} of its files had to make room: see --max-size and --files.")
        if self._wanted.bodies != "none" and self.num_begun:
            print(f"callboard replay {path}    runs its requests again")


@contextmanager
def _on_signals(stop: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
