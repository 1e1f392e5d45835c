"""The grammar of ``callboard route``. Nothing heavy is imported here."""

import argparse
from collections.abc import Callable

Command = Callable[..., argparse.ArgumentParser]
"""What cli.py makes commands with: (name, summary, examples, entry, within) -> parser."""

EXAMPLES = """\
callboard route new mine                 write mine.py, a script to begin with
callboard route check mine.py            what would it do? on simulated engines, without a fleet
callboard route set mine.py              every new request takes it; those in flight finish under the old one
callboard route set mine.py --canary 10  10 per cent of them; then route promote, or route rollback
callboard route set mine.py --shadow     it decides, nothing is sent, the decisions are compared
callboard route show
callboard route rollback"""
FAILURES = """
roll-back: a script that fails by its own fault in 3 of its last 20 requests (--max-failures 3) is rolled back by the
router itself: to the script before it, or, of a canary, to the active one. Engines that die, full pools, bad requests
and clients that leave do not count. --max-failures 0 switches it off. See "callboard route history" for its traceback.
A script that keeps the router from everything else is interrupted after "hang" of its fleet file (2 s), which counts.
Requests in flight finish under the script they began with; only where it was rolled back for failing does a later
attempt of theirs, after an engine's death, take the active one.
"""


def add(command: Command) -> None:
    """Add ``route`` to the command line."""
    route = command("route", "change the routers' script while the fleet serves", EXAMPLES, "")
    acts = route.add_subparsers(title="commands", metavar="COMMAND", dest="act", required=True)

    examples = "callboard route set mine.py --set ratio=0.3\ncallboard route set least_loaded --router main"
    change = command("set", "check a script and make the routers run it", examples, "route.change:run_set", acts)
    change.epilog = f"{change.epilog}{FAILURES}"
    _file(change)
    change.add_argument("--canary", type=_percent, metavar="P", help="only for P per cent of the requests")
    words = "it decides for every request, nothing is sent, and its decisions are compared with the active script's"
    change.add_argument("--shadow", action="store_true", help=words)
    words = "so many failures in its last 20 requests roll it back (default 3; 0: never)"
    change.add_argument("--max-failures", type=_failures, default=3, metavar="N", help=words)
    change.add_argument("--no-check", action="store_true", help="set it without a dry run")
    _fleet(change)

    examples = "callboard route promote"
    promote = command(
        "promote", "make the canary, or the shadow, the script", examples, "route.change:run_promote", acts
    )
    _fleet(promote)

    examples = "callboard route rollback         end the canary or shadow; without one, back to the script before\n"
    examples += "callboard route rollback 3       to version 3 of the history"
    back = command("rollback", "go back to an earlier script", examples, "route.change:run_rollback", acts)
    back.add_argument("to", nargs="?", metavar="VERSION", help="its number, or the beginning of its hash")
    _fleet(back)

    examples = "callboard route show\ncallboard route show --source\ncallboard route show --json"
    show = command("show", "show what the routers run, and how it does", examples, "route.show:run_show", acts)
    show.add_argument("--source", action="store_true", help="print the script's text, and nothing else")
    show.add_argument("--json", action="store_true", help="print all of it as JSON")
    _fleet(show)

    history = command(
        "history",
        "show what the routers have run, and why it changed",
        "callboard route history",
        "route.show:run_history",
        acts,
    )
    history.add_argument("--json", action="store_true", help="print all of it as JSON")
    _fleet(history)

    new = command("new", "write a script to begin with", "callboard route new mine", "route.new:run_new", acts)
    new.add_argument("name", metavar="NAME", help="mine, or a path such as routers/mine.py")

    examples = "callboard route check mine.py\ncallboard route check balanced --set ratio=0.3"
    check = command("check", "check a script and try it on simulated engines", examples, "route.check:run", acts)
    _file(check)
    check.add_argument("--no-types", action="store_true", help="do not check its types with mypy")

    command("list", "list the scripts that ship", "callboard route list", "route.new:run_list", acts)


def _file(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", metavar="FILE", help="a script's path, or the name of a shipped one")
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="an option of the script")


def _fleet(command: argparse.ArgumentParser) -> None:
    words = "only this router, by default all that the frontends ask"
    command.add_argument("--router", metavar="NAME", help=words)
    command.add_argument("--fleet", metavar="FLEET", help="its name or address, when several run")
    command.add_argument("--keys", metavar="DIR", help="the fleet's keys, if not where it was started with them")


def _percent(text: str) -> float:
    try:
        share = float(text.removesuffix("%"))
    except ValueError:
        share = -1.0
    if not 0 < share <= 100:
        raise argparse.ArgumentTypeError(f'"{text}" is no share: give per cent of the requests, above 0 and up to 100')
    return share


def _failures(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) > 20:
        raise argparse.ArgumentTypeError(f'"{text}" is no number of failures: give 0 (never) to 20')
    return int(text)
