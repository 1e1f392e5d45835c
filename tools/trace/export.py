"""``callboard trace export``: requests as other tools read them, from a running fleet's rings or from a recording."""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from callboard.tools.errors import CliError

from .source import MOST_REQUESTS, Source, source_of, stories_of
from .story import Story


def run(arguments: argparse.Namespace) -> int:
    """Write what is asked for. Raises CliError."""
    if arguments.to == "otlp":
        from .otlp import run as run_otlp

        return run_otlp(arguments)
    if arguments.endpoint is not None:
        raise CliError(f"--endpoint is for otlp: name a file for {arguments.to} with -o FILE")
    if arguments.to != "mermaid" and arguments.output is None and sys.stdout.isatty():
        suffix = "html" if arguments.to == "html" else "json"
        raise CliError(f"this is much to print: name a file, as in -o trace.{suffix}")
    source = source_of(arguments)
    told = stories_of(source, arguments.requests, _last(arguments, 1 if arguments.to == "mermaid" else MOST_REQUESTS))
    file = io.BytesIO()
    if arguments.to == "perfetto":
        from . import perfetto

        perfetto.write(told, file, entries=source.entries, fleet=source.fleet)
    elif arguments.to == "html":
        from . import html

        file.write(html.page(told, entries=source.entries, fleet=source.fleet))
    else:
        from . import mermaid

        file.write("\n".join(mermaid.diagram(story, source.entries) for story in told).encode())
    _put(file.getbuffer(), arguments.output)
    _say(arguments, told, source)
    return 0


def _last(arguments: argparse.Namespace, default: int) -> int:
    if arguments.last is None:
        return default
    if not arguments.last:
        raise CliError("--last 0 leaves nothing to export: give for example --last 10")
    return int(arguments.last)


def _put(data: memoryview, path: str | None) -> None:
    """Write a file as a whole, or to standard output."""
    if path is None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    whole = Path(path)
    if whole.exists() and not whole.is_file():  # Such as /dev/stdout.
        try:
            with whole.open("wb") as file:
                file.write(data)
        except OSError as error:
            raise CliError(f"cannot write {path}: {error.strerror}") from None
        return
    part = whole.with_name(f".{whole.name}.{os.getpid()}")
    try:
        _write(part, data)
        part.replace(whole)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise CliError(f"cannot write {path}: {error.strerror}") from None


def _write(path: Path, data: memoryview) -> None:
    with path.open("wb") as file:
        file.write(data)


def _say(arguments: argparse.Namespace, told: Sequence[Story], source: Source) -> None:
    """Say on standard error what was written, and what is not in it."""
    for node, why in sorted(source.missing.items()):
        print(f"node {node} could not be asked, so what it knows is missing: {why}", file=sys.stderr)
    if arguments.output is not None:
        number = "1 request" if len(told) == 1 else f"{len(told):,} requests"
        hint = {"perfetto": ": open it at https://ui.perfetto.dev", "html": ": open it in a browser"}
        print(f"{arguments.output}: {number}{hint.get(arguments.to, '')}", file=sys.stderr)
