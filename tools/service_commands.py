"""The arguments of the commands that change a fleet while it serves; their modules are imported when they run."""

import argparse
from collections.abc import Callable

Command = Callable[..., argparse.ArgumentParser]


def add(command: Command) -> None:
    """Add the commands to the parser that ``command`` adds to."""
    more = command(
        "add",
        "start more engines in a running fleet",
        "callboard add engine --like decode\n"
        "callboard add engine --like decode --count 2\n"
        "callboard add engine --like decode --name spare --device cpu:3",
        "add:run",
    )
    more.add_argument("what", choices=("engine",), metavar="engine", help="what is added: engine")
    more.add_argument("--like", required=True, metavar="NAME", help="the engine whose model, roles and limits it has")
    more.add_argument("--name", metavar="NAME", help="what it is called; by default the next free number")
    more.add_argument("--device", metavar="DEVICE", help="where it runs; by default the next device without an engine")
    more.add_argument("--count", type=int, default=1, metavar="K", help="how many (default 1)")
    _options(more)

    drain = command(
        "drain",
        "empty an engine: no new requests, and what it generates goes on elsewhere",
        "callboard drain decode-0              until it is empty; Ctrl-C leaves, and it drains on\n"
        "callboard drain decode-0 --no-wait\n"
        "callboard drain decode-0 --undo       it is offered to requests again",
        "drain:run",
    )
    drain.add_argument("engine", metavar="ENGINE", help="its name, as callboard ps shows it")
    drain.add_argument("--undo", action="store_true", help="have it serve again; what has moved stays where it is")
    drain.add_argument("--no-wait", action="store_true", help="return at once")
    drain.add_argument("--json", action="store_true", help="print the outcome as JSON")
    _options(drain)

    restart = command(
        "restart",
        "drain an engine or a frontend, and start its process anew",
        "callboard restart decode-0\ncallboard restart decode-0 --now     without draining: its requests are recovered",
        "restart:run",
    )
    restart.add_argument(
        "node",
        metavar="NAME",
        help="an engine, or one of several frontends; with --now also a KV manager, a router or an actor of yours",
    )
    restart.add_argument("--now", action="store_true", help="do not drain it before")
    _options(restart)

    role = command(
        "role",
        "change what an engine is for",
        "callboard role decode-0 prefill\ncallboard role decode-0 both",
        "role:run",
    )
    role.add_argument("engine", metavar="ENGINE", help="its name, as callboard ps shows it")
    words = "prefill, decode, both, or labels that your router script asks for"
    role.add_argument("roles", nargs="+", metavar="ROLE", help=words)
    _options(role)


def _options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--fleet", metavar="FLEET", help="which fleet, when several run")
    command.add_argument("--keys", metavar="DIR", help="the fleet's keys, if not where it was started with them")
