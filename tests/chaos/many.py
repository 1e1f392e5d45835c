"""Many seeds in several processes, and what they come to."""

import logging
import multiprocessing
import os
import signal
import time
from collections import Counter
from multiprocessing.queues import Queue
from multiprocessing.sharedctypes import Synchronized
from queue import Empty
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .harness import Outcome, run_seed

CONTEXT = multiprocessing.get_context("spawn")
REAL_S = 120
"""A seed takes less than a second; one that takes this long stands still in real time."""
AGAIN = 20
"""Every so many seeds one is run twice: its log must be the same."""
MOST_SHOWN = 20
"""Failing seeds that are shown."""
CLASSES = ("lost", "repeated", "leaked", "hung")


class StandsStill(BaseException):
    """Code that never gives the loop back. Not an Exception: nothing on the way may catch it."""


def work(parent: int, next_seed: "Synchronized[int]", last: int, outcomes: "Queue[Outcome]") -> None:
    """Run seeds until there are no more."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, _stands_still)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    while True:
        with next_seed.get_lock():
            seed = next_seed.value
            next_seed.value += 1
        if seed >= last or os.getppid() != parent:
            return
        signal.alarm(REAL_S)
        try:
            outcome = run_seed(seed)
            if seed % AGAIN == 0 and run_seed(seed).log_digest != outcome.log_digest:
                outcome.problems.append("another run of it had another log")
        except StandsStill:
            outcome = Outcome(seed, hung=1, problems=[f"hung: it stood still for {REAL_S} s of real time"])
        signal.alarm(0)
        outcomes.put(outcome)


def _stands_still(number: int, frame: FrameType | None) -> None:
    raise StandsStill


class Totals:
    """What all seeds came to."""

    def __init__(self) -> None:
        self.num_seeds = 0
        self.classes: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.changes: Counter[str] = Counter()
        self.num_messages = 0
        self.failing: list[Outcome] = []

    def add(self, outcome: Outcome) -> None:
        self.num_seeds += 1
        for name in CLASSES:
            self.classes[name] += getattr(outcome, name)
        for name in ("requests", "finished", "failed", "continued", "held"):
            self.requests[name] += getattr(outcome, f"num_{name}")
        self.faults.update(outcome.faults)
        self.changes.update(outcome.changes)
        self.num_messages += outcome.num_messages
        if outcome.problems:
            self.failing.append(outcome)

    def lines(self, seconds: float) -> list[str]:
        """Return the totals in words: first what was wrong, with the commands that show it, last the sums."""
        lines = []
        for outcome in sorted(self.failing, key=lambda outcome: outcome.seed)[:MOST_SHOWN]:
            lines.append(f"seed {outcome.seed} {class_of(outcome)}: {outcome.problems[0]}")
            lines.append(f"    {replay(outcome.seed)}")
        if len(self.failing) > MOST_SHOWN:
            lines.append(f"and {len(self.failing) - MOST_SHOWN} more seeds that fail")
        faults, changes = (
            ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "none"
            for counts in (self.faults, self.changes)
        )
        lines.append(
            f"{self.requests['requests']} requests: {self.requests['finished']} finished, {self.requests['failed']} "
            f"failed or left; {self.requests['continued']} went on elsewhere, {self.requests['held']} held for it; "
            f"{self.num_messages} messages; faults: {faults}; changes: {changes}; "
            f"{self.num_seeds / seconds:.1f} seeds/s"
        )
        return [*lines, self.sums()]

    def sums(self) -> str:
        """Return the one line that says whether all is well."""
        num_others = sum(class_of(outcome) == "wrong" for outcome in self.failing)
        return (
            f"{self.num_seeds} seeds: "
            + ", ".join(f"{self.classes[name]} {name}" for name in CLASSES)
            + (f", {num_others} otherwise wrong" if num_others else "")
        )


def class_of(outcome: Outcome) -> str:
    """Return what kind of wrong a failing seed is."""
    return next((name for name in CLASSES if getattr(outcome, name)), "wrong")


def replay(seed: int) -> str:
    """Return the command that shows a seed."""
    return f"make chaos SEED={seed}"


def run_all(first: int, num_seeds: int, num_jobs: int) -> int:
    """Run seeds in as many processes; return the exit status."""
    next_seed: Synchronized[int] = CONTEXT.Value("q", first)
    outcomes: Queue[Outcome] = CONTEXT.Queue()
    last = first + num_seeds
    arguments = (os.getpid(), next_seed, last, outcomes)
    workers = [CONTEXT.Process(target=work, args=arguments, daemon=True) for _ in range(num_jobs)]
    totals = Totals()
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    begin_s = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    is_interrupted = False
    try:
        # The workers inherit it, and never see an interrupt: the parent says when it is over.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        for worker in workers:
            worker.start()
        signal.signal(signal.SIGINT, before)
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("0 failing", total=num_seeds)
            while totals.num_seeds < num_seeds:
                try:
                    totals.add(outcomes.get(timeout=1.0))
                except Empty:
                    if not any(worker.is_alive() for worker in workers):
                        break  # They have said why on standard error.
                    continue
                progress.update(task, advance=1, description=f"{len(totals.failing)} failing")
    except KeyboardInterrupt:
        is_interrupted = True
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # It is ending already.
        for worker in workers:
            if worker.pid is not None:
                worker.terminate()
    for worker in workers:
        if worker.pid is not None:
            worker.join()
    is_whole = totals.num_seeds == num_seeds
    if not is_whole:
        print(f"{'interrupted' if is_interrupted else 'ended'} after {totals.num_seeds} of {num_seeds} seeds")
    print("\n".join(totals.lines(time.monotonic() - begin_s)))
    return 130 if is_interrupted else 1 if totals.failing or not is_whole else 0
