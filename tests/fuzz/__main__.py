"""``make fuzz``: wrong messages by the million, to a fleet in this process and to a node in another.

A failing run is replayed by its seed. What was sent last is saved, and ``--replay`` sends it to a fresh fleet.
"""

import argparse
import json
import logging
import secrets
import sys
import time
from base64 import b64decode, b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .in_process import FuzzError, Totals, fuzz, on_fuzz_loop, replay
from .over_zmq import run_over_zmq
from .recorder import Corpus, record

FAILURES = Path("build/fuzz")
MOST_GROWTH_MIB = 16
ZMQ_SHARE = 25
"""Over ZeroMQ, to another process, one message for so many in this one."""

Fuzz = Callable[[Corpus, int, int, Callable[[int], None]], Totals]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--messages", type=int, default=1_000_000, metavar="N", help="how many (default a million)")
    parser.add_argument("--seed", type=int, metavar="N", help="what they are drawn from; by default another each time")
    parser.add_argument("--only", choices=["fleet", "zmq"], help="the fleet in this process, or the node in another")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="send again what a failed run saved")
    options = parser.parse_args()
    if options.messages < 1:
        parser.error("--messages must be at least 1")
    seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    logging.getLogger("callboard").addHandler(logging.NullHandler())
    if options.replay is not None:
        try:
            saved = json.loads(options.replay.read_text())
        except (OSError, ValueError) as error:
            parser.error(f"--replay: {error}")
    corpus = record()
    if options.replay is not None:
        return _replay(corpus, saved)
    print(f"seed {seed}")
    targets: dict[str, tuple[Fuzz, int]] = {
        "fleet": (lambda *run: on_fuzz_loop(lambda: fuzz(*run)), options.messages),
        "zmq": (run_over_zmq, max(1, options.messages // ZMQ_SHARE)),
    }
    for name, (target, messages) in targets.items():
        if options.only in (None, name) and not _run(name, target, corpus, seed, messages):
            return 1
    return 0


def _run(name: str, target: Fuzz, corpus: Corpus, seed: int, messages: int) -> bool:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    begin = time.monotonic()
    try:
        with Progress(*columns, transient=True) as progress:
            task = progress.add_task(name, total=messages)
            totals = target(corpus, seed, messages, lambda sent: progress.update(task, completed=sent))
    except KeyboardInterrupt:
        print(f"{name}: stopped after {progress.tasks[0].completed:.0f} of {messages} messages: nothing found so far")
        raise
    except FuzzError as error:
        print(f"{name}: after {error.sent} of {messages} messages: {error}")
        print(f"all of it again: make fuzz SEED={seed} MESSAGES={messages} ONLY={name}")
        if error.lines:
            print(f"what was sent last: make fuzz REPLAY={_save(name, seed, error)}")
        return False
    counts = totals.counts
    is_flat = totals.growth_mib < MOST_GROWTH_MIB
    print(
        f"{name}: {counts['sent']} messages in {time.monotonic() - begin:.0f} s: no actor ended; "
        f"{counts['malformed']} links cut for a malformed batch, {totals.num_refused} refusals counted; "
        f"{counts['questions']} questions, none ended twice or never; "
        f"memory {totals.growth_mib:+.1f} MiB{'' if is_flat else ': it grows'}; {totals.num_lines} lines logged"
    )
    return is_flat


def _save(name: str, seed: int, error: FuzzError) -> Path:
    FAILURES.mkdir(parents=True, exist_ok=True)
    path = FAILURES / f"{name}-{seed}-{error.sent}.json"
    lines = [[endpoint, [b64encode(batch).decode() for batch in batches]] for endpoint, batches in error.lines]
    path.write_text(json.dumps({"seed": seed, "sent": error.sent, "error": str(error), "lines": lines}, indent=1))
    return path


def _replay(corpus: Corpus, saved: dict[str, Any]) -> int:
    lines = [(endpoint, [b64decode(batch) for batch in batches]) for endpoint, batches in saved["lines"]]
    try:
        on_fuzz_loop(lambda: replay(corpus, lines))
    except FuzzError as error:
        print(f"it fails again: {error}")
        return 1
    print(f"alone this does no harm; all of the run again: make fuzz SEED={saved['seed']} MESSAGES={saved['sent']}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
