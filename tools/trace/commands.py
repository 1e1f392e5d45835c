"""The grammar of ``callboard trace``: what may be asked, and which module answers. Nothing heavy is imported here."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from callboard.tools.errors import CliError

Command = Callable[..., argparse.ArgumentParser]
"""What cli.py makes commands with: (name, summary, examples, entry, within) -> parser."""

EXAMPLES = """\
callboard trace                              watch a live view; in a pipe, lines
callboard trace --format text                lines: the last requests, then messages as they happen
callboard trace --actor decode --slower 50ms
callboard trace --request 4f1d22c0 --no-follow
callboard trace --format jsonl | jq .verb
callboard trace explain --slowest            where did its time go?
callboard trace export html -o trace.html"""
FIELDS = """
lines of JSON (--format jsonl):
  type is "record" or "notice". A record has wall (ISO 8601, UTC), time_s (seconds on this machine's monotonic clock),
  node, what (sent, received, answered, ended: the four of a call; or span), verb, from, to (and actor: who is
  addressed on the bus), request, span and parent (16 hex digits), bytes, items, took_s, first_s (from its begin to
  the first item), error_s (the times are known to plus or minus this), error, and facts; what is empty is left out.
  A notice has wall, time_s, kind, node, text, and num_lost (records that were made and are not told).
"""
FORMATS = ("live", "text", "jsonl")
RECORDING = "a recording, in place of a running fleet"
PARTIAL = "of a damaged recording take what is whole"
EXPORTS = ("perfetto", "html", "mermaid", "otlp")


class Mixed(argparse.ArgumentParser):
    """A parser that takes options between positional words, too: ``export html -o FILE REQUEST``."""

    _is_mixed = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse options first, then the words between them."""
        if self._is_mixed:
            return super().parse_known_args(args, namespace)
        self._is_mixed = True  # What parses mixed words may come by here, again.
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_mixed = False


def add(command: Command) -> None:
    """Add ``trace`` and its commands to the command line."""
    trace = command(
        "trace", "watch the sub-requests of a running fleet, live and afterwards", EXAMPLES, "trace.commands:run"
    )
    _where(trace)
    _filters(trace)
    trace.add_argument("--last", type=_count, metavar="N", help="requests of the past to begin with (default 10)")
    trace.add_argument("--no-follow", action="store_true", help="show the past, and leave")
    trace.add_argument("--from", dest="source", metavar="FILE", help=f"{RECORDING}, in the live view")
    trace.add_argument("--partial", action="store_true", help=PARTIAL)
    trace.add_argument("--format", choices=FORMATS, help="by default live in a terminal, text in a pipe")
    assert trace.epilog is not None
    trace.epilog += FIELDS
    trace.usage = "callboard trace [OPTION ...]\n       callboard trace COMMAND [OPTION ...]"
    acts = trace.add_subparsers(
        title="commands", metavar="COMMAND", dest="act", prog="callboard trace", parser_class=Mixed
    )

    explain = command(
        "explain",
        "say where the time of one request went, to the millisecond",
        "callboard trace explain                      the last request\ncallboard trace explain 4f1d22c0\n"
        "callboard trace explain --slowest",
        "trace.explain:run",
        acts,
    )
    explain.add_argument("request", nargs="?", metavar="REQUEST", help="a request id, or how it begins")
    explain.add_argument("--slowest", action="store_true", help="the request that took longest, of all remembered")
    explain.add_argument("--json", action="store_true", help="print JSON")

    export = command(
        "export",
        "write requests for other tools: Perfetto, a web page, a Mermaid diagram, OpenTelemetry",
        "callboard trace export perfetto -o trace.json    open it at https://ui.perfetto.dev\n"
        "callboard trace export html 4f1d22c0 -o trace.html\ncallboard trace export mermaid --last 1\n"
        "callboard trace export otlp --endpoint http://localhost:4318",
        "trace.export:run",
        acts,
    )
    export.add_argument("to", choices=EXPORTS, metavar="{" + ",".join(EXPORTS) + "}", help="what to write")
    words = "request ids; by default all remembered"
    export.add_argument("requests", nargs="*", default=[], metavar="REQUEST", help=words)
    words = "the last N requests (1,000; mermaid 1)"
    export.add_argument("--last", type=_count, default=argparse.SUPPRESS, metavar="N", help=words)
    export.add_argument("-o", "--output", metavar="FILE", help="where to; by default standard output")
    export.add_argument("--endpoint", metavar="URL", help="of the OTLP collector (http://localhost:4318)")
    words = "otlp: what stands before an actor's name in service.name, as in NAME.decode"
    export.add_argument("--service-name", metavar="NAME", help=words)
    words = "otlp: what is past, not what follows"
    export.add_argument("--no-follow", action="store_true", default=argparse.SUPPRESS, help=words)

    record = command(
        "record",
        "keep what happens in a file, to look at and to replay",
        "callboard trace record today.rec\ncallboard trace record today.rec --for 10m --max-size 1GiB",
        "trace.record:run",
        acts,
    )
    record.add_argument("file", metavar="FILE", help="the recording")
    prompts = ("none", "hashed", "full")
    words = "prompts as salted hashes of their blocks (default), whole, or not at all"
    record.add_argument("--prompts", choices=prompts, default="hashed", help=words)
    record.add_argument("--max-size", default="256MiB", metavar="SIZE", help="begin a new file at this size (256MiB)")
    record.add_argument("--files", type=_count, default=4, metavar="N", help="files kept, the oldest goes first (4)")
    record.add_argument("--requests", type=_count, metavar="N", help="stop after so many requests have ended")
    record.add_argument("--for", dest="duration", metavar="TIME", help="stop after this long, such as 10m")
    for each in (explain, export, record):
        _where(each, inherits=True)
    for each in (explain, export):
        each.add_argument("--from", dest="source", metavar="FILE", default=argparse.SUPPRESS, help=RECORDING)
        each.add_argument("--partial", action="store_true", default=argparse.SUPPRESS, help=PARTIAL)


def _where(command: argparse.ArgumentParser, *, inherits: bool = False) -> None:
    default: Any = argparse.SUPPRESS if inherits else None  # Else it would undo what stands before the subcommand.
    command.add_argument(
        "--fleet",
        metavar="FLEET",
        default=default,
        help="which fleet, when several run: its name, or NAME@tcp://HOST:PORT of its directory",
    )
    words = "the fleet's keys, if not where it was started with them"
    command.add_argument("--keys", metavar="DIR", default=default, help=words)


def _filters(command: argparse.ArgumentParser) -> None:
    command.add_argument("--request", metavar="ID", help="only this request: its id, or how it begins")
    command.add_argument("--actor", metavar="NAME", help="only what this actor asks or is asked")
    command.add_argument("--verb", metavar="NAME", help="only this message or phase, such as prep_recv, prefill")
    command.add_argument("--slower", metavar="TIME", help="only what took longer, such as 50ms")
    command.add_argument("--errors", action="store_true", help="only what failed")
    command.add_argument("--all", action="store_true", help="also messages of no request, and the smallest phases")


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f'"{text}" is no count: give for example 10')
    return int(text)


def has_screen() -> bool:
    """Return whether there is a terminal that the live view can be drawn on: Textual draws on standard error."""
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty() and sys.stderr.isatty()
    is_able = os.environ.get("TERM", "") not in ("", "dumb") and "utf" in (sys.stderr.encoding or "").lower()
    return is_terminal and is_able


def run(arguments: argparse.Namespace) -> int:
    """Show what happens in the format that was asked for, or that suits where the output goes."""
    wanted = arguments.format
    if wanted is None:
        is_live = has_screen() and (not arguments.no_follow or arguments.source is not None)
        wanted = "live" if is_live else "text"
    if arguments.source is not None and wanted != "live":
        raise CliError("--from needs the live view, and that needs a terminal: else use callboard trace explain --from")
    module = "live" if wanted == "live" else "lines"
    arguments.format = wanted
    code: int = importlib.import_module(f"callboard.tools.trace.{module}").run(arguments)
    return code
