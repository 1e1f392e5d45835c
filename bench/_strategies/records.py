"""What a run has found so far, kept as lines of JSON while it goes on: a run that is cut short goes on from there."""

import os
from pathlib import Path
from typing import Any

import msgspec

from .load import Met
from .mixes import MIXES, Mix
from .model import Shape


class Setup(msgspec.Struct, frozen=True, tag=True):
    """The first line: what must be the same for two runs to be one."""

    shape: Shape
    budgets: list[int]
    num_requests: int
    machine: dict[str, Any]
    is_simulated: bool
    mixes: tuple[Mix, ...] = MIXES
    scripts: dict[str, str] = {}
    """The texts' digests."""


class Tuned(msgspec.Struct, frozen=True):
    """A deployment with one token budget, tried."""

    deployment: str
    budget: int
    mean_jct_s: float


class Calibrated(msgspec.Struct, frozen=True, tag=True):
    """What a mix needs to be known first: rates, budgets, and a request alone."""

    mix: str
    saturation: float
    """Requests a second that data parallelism finishes at most, with ``AT_ONCE`` clients that wait for answers."""
    budgets: dict[str, int]
    """The best one for each deployment."""
    tuning: list[Tuned]
    alone_ttft_s: float
    alone_tpot_s: float
    alone_jct_s: float

    def slo(self, times_ttft: float, times_tpot: float) -> tuple[float, float]:
        """Return the objective for TTFT and TPOT, in seconds."""
        return times_ttft * self.alone_ttft_s, times_tpot * self.alone_tpot_s


class Measured(msgspec.Struct, frozen=True, tag=True):
    """One block: a strategy, under a mix at a rate, in a round."""

    round: int
    mix: str
    utilisation: float
    strategy: str
    rate: float
    budget: int
    seconds: float
    cpu_s: dict[str, float]
    met: list[Met]

    @property
    def key(self) -> tuple[int, str, float, str]:
        return self.round, self.mix, self.utilisation, self.strategy


class Compared(msgspec.Struct, frozen=True, tag=True):
    """One round of something measured on two sides: values by name."""

    what: str
    round: int
    values: dict[str, float]


Line = Setup | Calibrated | Measured | Compared


class Records:
    """All lines of a run; what is added is on disk at once."""

    def __init__(self, path: Path | None, setup: Setup) -> None:
        """Go on with what is in the file, if anything. Raises SystemExit where that is of another setup."""
        self.setup = setup
        self.calibrated: dict[str, Calibrated] = {}
        self.measured: dict[tuple[int, str, float, str], Measured] = {}
        self.compared: dict[tuple[str, int], Compared] = {}
        self._path = path
        if path is not None and path.exists() and path.stat().st_size:
            self._read(path)
        else:
            self._write(setup)

    def add(self, line: Calibrated | Measured | Compared) -> None:
        """Keep one."""
        self._take(line)
        self._write(line)

    def _read(self, path: Path) -> None:
        whole, _, torn = path.read_bytes().rpartition(b"\n")
        if torn:  # The last line of a run that was killed.
            os.truncate(path, len(whole) + 1)
        first, *others = (msgspec.json.decode(line, type=Line) for line in whole.splitlines())
        if first != self.setup:
            raise SystemExit(f"{path} is of a run that was set up otherwise: give another --keep, or --fresh")
        for line in others:
            self._take(line)

    def _take(self, line: Line) -> None:
        if isinstance(line, Calibrated):
            self.calibrated[line.mix] = line
        elif isinstance(line, Measured):
            self.measured[line.key] = line
        elif isinstance(line, Compared):
            self.compared[line.what, line.round] = line

    def _write(self, line: Line) -> None:
        if self._path is not None:
            with self._path.open("ab") as file:
                file.write(msgspec.json.encode(line) + b"\n")
