"""The ``callboard`` command. A command's module is imported when it runs, so that ``--help`` and ``ps`` are instant."""

import argparse
import importlib
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from . import observe_commands, service_commands
from .errors import CliError
from .replay import commands as replay_commands
from .route import commands as route_commands
from .trace import commands as trace_commands

OVERVIEW = """\
examples:
  callboard up                       start the embedded model: one prefill and one decode engine
  callboard chat "Who are you?"      ask it
  callboard requests                 see that request's prep_recv, remote_send, start_generate
  callboard trace                    watch them as they happen
  callboard ps                       who is there, and how busy
  callboard top                      the same live, with rates and latencies
  callboard down                     stop it

Every command says more with --help. With exactly one fleet running, its name may be left out.
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = argparse.ArgumentParser(
        prog="callboard",
        description="LLM microserving as actors on a message bus.",
        epilog=OVERVIEW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="store_true", help="print the version and exit")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", dest="command")

    def command(name: str, summary: str, examples: str, entry: str, within: Any = commands) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = within.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog="examples:\n" + "".join(f"  {line}\n" for line in examples.splitlines()),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(entry=entry)
        return made

    up = command(
        "up",
        "start a fleet and keep it up",
        "callboard up\ncallboard up fleet.toml\ncallboard up fleet.toml --detach\ncallboard up --name second --port 0",
        "up:run",
    )
    up.add_argument("file", nargs="?", metavar="FILE", help="the fleet file; without one, the embedded default")
    up.add_argument("--detach", action="store_true", help="return once the fleet is ready; it runs on")
    up.add_argument("--port", type=int, metavar="N", help="HTTP port instead of the file's; 0 takes any free one")
    up.add_argument("--name", metavar="NAME", help="the fleet's name instead of the file's")
    up.add_argument("--events-fd", type=int, help=argparse.SUPPRESS)

    join = command(
        "join",
        "bring this machine's engines into a fleet that runs on another one",
        "callboard join tcp://10.0.0.1:7000 fleet.toml --host b --keys keys\n"
        "callboard join demo@tcp://10.0.0.1:7000 fleet.toml --host b --listen 10.0.0.2:7100 --detach",
        "join:run",
    )
    join.add_argument(
        "address", metavar="ADDRESS", help="of the fleet's bus; NAME@ADDRESS if the file is named otherwise"
    )
    words = "its engines with this host's name, or all if none names a host (fleet.toml)"
    join.add_argument("file", metavar="FILE", nargs="?", default="fleet.toml", help=words)
    join.add_argument("--host", metavar="NAME", help="what this machine is called in the fleet, by default as it is")
    join.add_argument("--keys", metavar="DIR", help="a copy of the fleet's keys, if not where the file says")
    words = "an address of this machine that the others reach, and the first of its ports to use"
    join.add_argument("--listen", metavar="ADDRESS[:PORT]", help=words)
    join.add_argument("--detach", action="store_true", help="return once the fleet sees the engines; they run on")
    join.add_argument("--events-fd", type=int, help=argparse.SUPPRESS)

    examples = "callboard ps\ncallboard ps demo --wide\ncallboard ps demo@tcp://10.0.0.1:7000 --keys keys --json"
    ps = command("ps", "show who is in a running fleet, and how busy", examples, "ps:run")
    ps.add_argument("fleet", nargs="?", metavar="FLEET", help="its name or address; without one, every fleet that runs")
    ps.add_argument("--wide", action="store_true", help="also process ids, devices and addresses")
    ps.add_argument("--json", action="store_true", help="print all of it as JSON")
    _keys_option(ps)

    observe_commands.add(command)

    chat = command(
        "chat",
        "talk to a running fleet",
        'callboard chat\ncallboard chat "Who are you?"\ncat question.txt | callboard chat\n'
        "OPENAI_API_KEY=... callboard chat    where the fleet wants a key",
        "chat:run",
    )
    chat.add_argument("question", nargs="*", metavar="QUESTION", help="ask this one question and leave")
    _fleet_option(chat)
    chat.add_argument("--model", metavar="NAME", help="the model to ask, by default the fleet's first")
    chat.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    chat.add_argument("--max-tokens", type=int, default=512, metavar="N", help="the longest answer (default 512)")
    chat.add_argument("--temperature", type=_finite, default=0.0, metavar="T", help="0 is greedy (default)")
    chat.add_argument(
        "--url", metavar="URL", help="another OpenAI endpoint, such as http://HOST:8000/v1 (with --model)"
    )

    requests = command(
        "requests",
        "show the sub-requests of the last request, or of one by its id",
        "callboard requests\ncallboard requests 4f1d22c0a9e34b11 --json",
        "requests:run",
    )
    requests.add_argument("id", nargs="?", metavar="ID", help="a request id, as in the x-request-id header")
    _fleet_option(requests)
    requests.add_argument("--json", action="store_true", help="print JSON")
    _keys_option(requests)

    trace_commands.add(command)
    replay_commands.add(command)

    logs = command(
        "logs",
        "print what the processes of a fleet have logged, by time",
        "callboard logs\ncallboard logs decode -f\ncallboard logs --level warning --tail 20\n"
        "callboard logs --request cmpl-4f1d22c0a9e34b11 --json\n"
        "callboard logs --failed              of the last fleet that failed",
        "logs:run",
    )
    logs.add_argument("name", nargs="*", metavar="NAME", help="such as control, prefill, kv-cpu0; by default, all")
    logs.add_argument("-f", "--follow", action="store_true", help="go on printing what is added")
    logs.add_argument("-n", "--tail", type=_count, metavar="N", help="only the last N lines of what is there")
    logs.add_argument(
        "--level", choices=("debug", "info", "warning", "error"), help="only lines of at least this level"
    )
    logs.add_argument("--request", metavar="ID", help="only what belongs to this request")
    logs.add_argument("--json", action="store_true", help="print the lines as they are, JSON")
    logs.add_argument("--list", action="store_true", help="print whose logs there are")
    logs.add_argument("--failed", action="store_true", help="of the last fleet (of that name) that failed")
    _fleet_option(logs)

    service_commands.add(command)
    route_commands.add(command)

    down = command("down", "stop a fleet in order", "callboard down\ncallboard down demo", "down:run")
    down.add_argument("fleet", nargs="?", metavar="FLEET", help="its name")
    down.add_argument("--all", action="store_true", help="stop every fleet of yours")

    check = command("check", "validate a fleet file", "callboard check fleet.toml", "init:run_check")
    check.add_argument("file", metavar="FILE", nargs="?", default="fleet.toml", help="by default fleet.toml")

    init = command("init", "write a commented fleet file", "callboard init\ncallboard init my.toml", "init:run")
    init.add_argument("file", metavar="FILE", nargs="?", default="fleet.toml", help="by default fleet.toml")
    init.add_argument("--force", action="store_true", help="overwrite an existing file")

    keys = command(
        "keys",
        "make the keys of a fleet's bus, or tell them apart",
        "callboard keys new            into the directory keys\ncallboard keys show ~/.callboard/demo",
        "",
    )
    acts = keys.add_subparsers(title="commands", metavar="COMMAND", dest="act", required=True)
    new = command(
        "new",
        "make a directory with the key of a fleet, readable by you alone",
        "callboard keys new\ncallboard keys new ~/.callboard/demo",
        "keys:run_new",
        acts,
    )
    new.add_argument("--force", action="store_true", help="replace a key that is there")
    show = command("show", "check a key file and print its fingerprint", "callboard keys show", "keys:run_show", acts)
    for each in (new, show):
        each.add_argument("folder", metavar="DIR", nargs="?", default="keys", help="by default keys")
    return top


def _finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f'"{text}" is no number: give for example 0.7')
    return number


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f'"{text}" is no number of lines: give for example 20')
    return int(text)


def _fleet_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--fleet", metavar="FLEET", help="which fleet, when several run")


def _keys_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--keys", metavar="DIR", help="the fleet's keys, if not where it was started with them")


def _version() -> str:
    from importlib.metadata import version

    return version("callboard")


def main(words: Sequence[str] | None = None) -> int:
    """Run the command that ``words`` (by default the command line) ask for; return the exit code."""
    top = parser()
    arguments = top.parse_args(words)
    if arguments.version:
        print(f"callboard {_version()}")
        return 0
    if arguments.command is None:
        top.print_help()
        return 0
    module, _, function = arguments.entry.partition(":")
    try:
        code: int = getattr(importlib.import_module(f"callboard.tools.{module}"), function)(arguments)
        sys.stdout.flush()
    except CliError as error:
        print(f"callboard: {error}" if "\n" not in str(error) else str(error), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # The reader left, as in "callboard logs x | head".
        return 0
    return code


if __name__ == "__main__":
    sys.exit(main())
