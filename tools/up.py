"""``callboard up``: start a fleet, in the foreground or detached, and say how to use it."""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from .default_fleet import default_fleet
from .errors import CliError, StartFailed
from .fleet_check import NAME, NAME_RULE, check_fleet
from .fleet_file import FleetFile, decode_fleet_file, load_fleet_file
from .launcher import Launcher
from .machine import split_address
from .progress import Event, Show, Started, describe_started, pipe_show, terminal_show


def run(arguments: argparse.Namespace) -> int:
    """Start the fleet of ``arguments.file``. Raises CliError."""
    file = load(arguments.file, name=arguments.name, port=arguments.port)
    if arguments.events_fd is not None:
        return run_daemon(lambda show: _launch(file, show, is_detached=True), arguments.events_fd)
    if arguments.detach:
        return say_started(start_detached(arguments.file, name=arguments.name, port=arguments.port))
    with terminal_show() as show:
        return uvloop.run(_launch(file, with_farewell(show), is_detached=False))


def say_started(started: Started | None) -> int:
    """Tell the user of a launcher that runs on by itself; return the exit code."""
    if started is not None:
        print(describe_started(started), flush=True)
    return 0


def load(path: str | None, *, name: str | None, port: int | None) -> FleetFile:
    """Return the checked fleet file at ``path``, or the default one, with name and port replaced if given."""
    if path is None:
        file = decode_fleet_file(default_fleet(), source="the default fleet", base=Path.cwd())
    else:
        file = load_fleet_file(Path(path))
    fleet = file.fleet
    if name is not None:
        if NAME.fullmatch(name) is None:
            raise CliError(f'--name "{name}" is no name: {NAME_RULE}')
        fleet = msgspec.structs.replace(fleet, name=name)
    if port is not None:
        host = fleet.listen.http.rpartition(":")[0]
        http = f"{host}:{port}"
        try:
            split_address(http)
        except ValueError:
            raise CliError(f"--port {port} is no port: give a number from 0 (any free one) to 65535") from None
        fleet = msgspec.structs.replace(fleet, listen=msgspec.structs.replace(fleet.listen, http=http))
    file = FleetFile(fleet, file.base, file.source, file.lines)
    check_fleet(file)
    return file


def with_farewell(show: Show) -> Show:
    """Return a Show that also prints how to use what has started."""

    def shown(event: Event) -> None:
        show(event)
        if event.started is not None:
            print(describe_started(event.started), flush=True)

    return shown


async def _launch(file: FleetFile, show: Show, *, is_detached: bool) -> int:
    return await Launcher(file, show=show, environment=os.environ, is_detached=is_detached).run()


# ---- detached: the foreground command waits, and a daemon is the launcher ------------------------------------------


def run_daemon(launch: Callable[[Show], Coroutine[Any, Any, int]], fd: int) -> int:
    """Be the launcher that ``detach`` has started: tell it of everything through ``fd``; return the exit code."""
    os.set_inheritable(fd, False)
    show = pipe_show(fd)
    try:
        return uvloop.run(launch(show))
    except CliError as error:
        show(Event("failed", str(error), exit_code=error.exit_code))
        return error.exit_code


def start_detached(file: str | None, *, name: str | None, port: int | None) -> Started | None:
    """Start a fleet whose launcher is a daemon: see ``detach``."""
    words = [] if file is None else [file]
    words += ["--name", name] if name is not None else []
    words += ["--port", str(port)] if port is not None else []
    return detach("up", words)


def detach(command: str, words: Sequence[str]) -> Started | None:
    """Run a command whose launcher is a daemon; return once it serves, or None if it was stopped while starting.

    Raises CliError with the launcher's own sentence if it does not come up; nothing of it is left then.
    """
    reader, writer = os.pipe()
    whole = [sys.executable, "-P", "-m", "callboard.tools.cli", command, "--events-fd", str(writer), *words]
    # Until it has a log of its own, the daemon speaks to this terminal.
    daemon = subprocess.Popen(whole, stdin=subprocess.DEVNULL, pass_fds=[writer], start_new_session=True)
    os.close(writer)
    try:
        with os.fdopen(reader, "rb") as lines, terminal_show() as show:
            for line in lines:
                event = msgspec.json.decode(line, type=Event)
                show(event)
                if event.kind == "failed":
                    daemon.wait()
                    raise _failure(event)
                if event.started is not None:
                    return event.started
        code = daemon.wait()
        if code == 0:
            return None
        raise StartFailed(f"the launcher ended with exit code {code} before it was up")
    except KeyboardInterrupt:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait()
        raise


def _failure(event: Event) -> CliError:
    error = CliError(event.text)
    error.exit_code = event.exit_code
    return error
