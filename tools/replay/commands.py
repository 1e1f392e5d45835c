"""The grammar of ``callboard replay``. Nothing heavy is imported here."""

import argparse
from collections.abc import Callable

Command = Callable[..., argparse.ArgumentParser]
"""What cli.py makes commands with."""

EXAMPLES = """\
callboard replay today.rec                        against the running fleet, or simulated where none runs
callboard replay today.rec --router mine.py       what would my script have done?
callboard replay today.rec --simulate big.toml    on a fleet that does not exist
callboard replay today.rec --fleet demo --speed 2"""
WHAT_IT_DOES = """\
Requests are asked again at their times, each for as many tokens as came of it when it was recorded; one that its
client left is left again. Prompts that were recorded as hashes become other tokens, with equal blocks where blocks
were equal. Times count from the router, without HTTP and tokenising.

A simulation runs the real directory, routers, scripts, KV managers and schedulers on a virtual clock. The model is
replaced by what the recording says of its steps (printed, with how well it fits), pages and messages take the time
they took there. It cannot tell:
  - what its engines' caches held before the recording began: a simulation begins with empty ones
  - what processes and machines cost each other: time on shared cores, in Python between two messages, on a busy link
  - faults: nobody dies or hangs, no link breaks, nobody joins or leaves
  - slow clients, other routers and users, and what the tokens say: every answer is as long as it was
The same recording, options and seed give the same result, byte for byte."""


def add(command: Command) -> None:
    """Add ``replay`` to the command line."""
    replay = command(
        "replay", "run the requests of a recording again, and say what differs", EXAMPLES, "replay.run:run"
    )
    replay.epilog = f"{replay.epilog}\n{WHAT_IT_DOES}"
    words = 'a recording, as "callboard trace record" makes them'
    replay.add_argument("file", nargs="?", metavar="FILE", help=words)
    replay.add_argument("--fleet", metavar="FLEET", help="a running fleet: its name, or NAME@tcp://HOST:PORT")
    replay.add_argument("--keys", metavar="DIR", help="the fleet's keys, if not where it was started with them")
    replay.add_argument(
        "--simulate",
        nargs="?",
        const="",
        metavar="FLEET.toml",
        help="in a simulation: of the recorded fleet, or of a fleet file's",
    )
    replay.add_argument(
        "--router", metavar="SCRIPT", help="another script than the recorded one: a path, or a shipped name"
    )
    replay.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="an option of the script")
    replay.add_argument("--speed", type=_number, default=1.0, metavar="X", help="ask X times as fast (default 1)")
    replay.add_argument("--limit", type=int, metavar="N", help="only the first N requests")
    replay.add_argument("--seed", type=int, default=0, metavar="N", help="of a simulation (default 0)")
    replay.add_argument("--json", action="store_true", help="print JSON, with every request")
    replay.add_argument("--partial", action="store_true", help="of a damaged recording take what is whole")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'"{text}" is no number: give for example 2') from None
