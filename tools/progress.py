"""What a starting fleet tells its user: events, and how they are shown on a terminal, in a log, and across a pipe."""

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import msgspec

from callboard.actors.supervisor import NodeState


class Started(msgspec.Struct, frozen=True):
    """A fleet that serves."""

    name: str
    pid: int
    url: str | None
    models: tuple[str, ...]
    is_detached: bool = False
    api_keys: str | None = None
    """The file of keys, where a client needs one."""
    bus: str | None = None
    """Where other machines reach the fleet."""
    file: str = ""
    hosts: tuple[str, ...] = ()
    """Those that the fleet file wants to join."""
    host: str = ""
    """The host that has joined, where this is one."""
    nodes: tuple[str, ...] = ()
    """What it has brought."""


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing to show."""

    kind: Literal["step", "warning", "news", "node", "ready", "failed"]
    text: str = ""
    node: NodeState | None = None
    started: Started | None = None
    exit_code: int = 0


Show = Callable[[Event], None]


def pipe_show(fd: int) -> Show:
    """Return a Show that writes events as JSON lines into ``fd``; a reader that left is no error."""

    def show(event: Event) -> None:
        try:
            os.write(fd, msgspec.json.encode(event) + b"\n")
        except OSError:
            pass

    return show


class PlainShow:
    """Events as lines, for logs and pipes."""

    def __call__(self, event: Event) -> None:
        if event.kind in ("step", "news"):
            print(event.text, file=sys.stderr, flush=True)
        elif event.kind == "warning":
            print(f"warning: {event.text}", file=sys.stderr, flush=True)
        elif event.node is not None and event.node.state != "starting":
            detail = f": {event.node.detail}" if event.node.detail else ""
            print(f"{event.node.name} {event.node.state}{detail}", file=sys.stderr, flush=True)


class RichShow:
    """Events as finished lines above a spinner that says what is going on."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)
        self._status: Any = None
        self._loading: dict[str, str] = {}

    def __enter__(self) -> "RichShow":
        self._status = self._console.status("starting")
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def __call__(self, event: Event) -> None:
        from rich.markup import escape

        if event.kind == "step":
            self._status.update(escape(event.text))
            self._status.start()
        elif event.kind in ("warning", "news"):
            mark = "[yellow]![/]" if event.kind == "warning" else "[green]✓[/]"
            self._console.print(f"{mark} {escape(event.text)}", markup=True)
        elif event.node is not None:
            self._node(event.node)
        elif event.kind in ("ready", "failed"):
            self._status.stop()

    def _node(self, node: NodeState) -> None:
        self._loading.pop(node.name, None)
        if node.state == "ready":
            self._console.print(f"[green]✓[/] {node.name} ready")
        elif node.state in ("failed", "restarting"):
            self._console.print(f"[red]✗[/] {node.name} {node.state}", end="")
            self._console.print(f": {node.detail}", markup=False)
        elif node.state in ("starting", "loading"):
            self._loading[node.name] = node.state
        if self._loading:
            self._status.update("loading " + ", ".join(self._loading))


def terminal_show() -> AbstractContextManager[Show]:
    """Return a Show for this terminal, as a context: Rich on a tty, plain lines elsewhere."""
    if sys.stderr.isatty():
        return RichShow()
    return nullcontext(PlainShow())


def describe_started(started: Started) -> str:
    """Return what a user wants to know of a fleet that serves: address, model, a line that works, what next."""
    if started.host:
        return _describe_joined(started)
    fleet = "" if started.name == "default" else f" {started.name}"
    lines = [f"Fleet {started.name} is up."]
    if started.url is not None:
        model = started.models[0]
        question = '[{"role": "user", "content": "What is the capital of France?"}]'
        body = f'{{"model": "{model}", "temperature": 0, "messages": {question}}}'
        lines += [f"  URL     {started.url}/v1", f"  model   {', '.join(started.models)}"]
        key = ""
        if started.api_keys is not None:
            lines.append(f"  key     a line of {started.api_keys}, in OPENAI_API_KEY")
            key = ' -H "Authorization: Bearer $OPENAI_API_KEY"'
        lines += ["", f"curl -s {started.url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\"]
        lines.append(f"  -d '{body}'")
    if started.hosts:
        lines += ["", "It serves once the others are there, with this file and its keys:"]
        lines += [f"  callboard join {started.bus} {started.file} --host {host}" for host in started.hosts]
    lines += ["", "Try next:"]
    hints = [(f"callboard ps{fleet}", "who is there, and how busy")]
    if started.url is not None:
        option = f" --fleet {started.name}" if fleet else ""
        hints.append((f"callboard chat{option}", "talk to it"))
        hints.append((f"callboard requests{option}", "the last request, part by part"))
        hints.append((f"callboard trace{option}", "watch every sub-request as it happens"))
    hints.append((f"callboard down{fleet}", "stop it" if started.is_detached else "stop it (or Ctrl-C here)"))
    width = max(len(command) for command, _ in hints)
    lines += [f"  {command:{width}}  {what}" for command, what in hints]
    return "\n".join(lines)


def _describe_joined(started: Started) -> str:
    fleet = f"{started.name}@{started.host}"
    lines = [f"Host {started.host} is in fleet {started.name} at {started.bus}: {', '.join(started.nodes)}."]
    stop = "leave the fleet" if started.is_detached else "leave the fleet (or Ctrl-C here)"
    hints = [
        ("ps", "who is in the fleet, on all hosts"),
        ("logs --fleet", "what this host's processes say"),
        ("down", stop),
    ]
    width = max(len(command) for command, _ in hints)
    lines += ["", "Try next:"]
    lines += [f"  callboard {command} {fleet}{' ' * (width - len(command))}  {what}" for command, what in hints]
    return "\n".join(lines)
