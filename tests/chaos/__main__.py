"""Many seeds on all cores, or one with its log: ``make chaos SEEDS=10000``, ``make chaos SEED=1234``."""

import argparse
import os
import sys

from .harness import run_seed
from .many import Totals, run_all

AROUND = 60
"""Lines of the log before and after what is wrong."""


def show(seed: int, *, is_whole: bool) -> int:
    """Run one seed and print its schedule, its log and what was wrong; return the exit status."""
    outcome = run_seed(seed, with_log=True)
    begin = next((i for i, line in enumerate(outcome.log) if line[:1] == " " and line.lstrip()[:1].isdigit()), 0)
    shown = set(range(begin))
    for i, line in enumerate(outcome.log):
        if is_whole or " *** WRONG" in line or " *** FAULT" in line:
            shown.update(range(max(0, i - AROUND), min(len(outcome.log), i + AROUND // 2)))
    before = -1
    for i in sorted(shown):
        if i != before + 1:
            print(f"... {i - before - 1} lines")
        print(outcome.log[i])
        before = i
    totals = Totals()
    totals.add(outcome)
    print(f"log {outcome.log_digest[:16]}, {outcome.virtual_s:.1f} s of virtual time")
    print("\n".join(f"wrong: {problem}" for problem in outcome.problems) or "nothing is wrong")
    print(totals.sums())
    return 1 if outcome.problems else 0


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'"{text}" is not a number from 1 on')
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("--seeds", type=_at_least_one, default=1000, help="how many (default 1000)")
    parser.add_argument("--first", type=int, default=0, help="the first of them (default 0)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=_at_least_one, default=cores, help="processes (default: one for each core)")
    parser.add_argument("--seed", type=int, help="run one seed and show it")
    parser.add_argument("--log", action="store_true", help="with --seed: all of the message log")
    options = parser.parse_args()
    if options.seed is not None:
        return show(options.seed, is_whole=options.log)
    return run_all(options.first, options.seeds, options.jobs)


if __name__ == "__main__":
    sys.exit(main())
