"""``callboard up``: start a fleet, in the foreground or detached, and say how to use it."""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

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
        return _run_daemon(file, arguments.events_fd)
    if arguments.detach:
        started = start_detached(arguments.file, name=arguments.name, port=arguments.port)
        if started is not None:
            print(describe_started(started), flush=True)
        return 0
    with terminal_show() as show:
        return uvloop.run(_launch(file, _with_farewell(show), is_detached=False))


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


def _with_farewell(show: Show) -> Show:
    def shown(event: Event) -> None:
        show(event)
        if event.started is not None:
            print(describe_started(event.started), flush=True)

    return shown


async def _launch(file: FleetFile, show: Show, *, is_detached: bool) -> int:
    return await Launcher(file, show=show, environment=os.environ, is_detached=is_detached).run()


# ---- detached: the foreground command waits, and a daemon is the launcher ------------------------------------------


def _run_daemon(file: FleetFile, fd: int) -> int:
    os.set_inheritable(fd, False)
    show = pipe_show(fd)
    try:
        return uvloop.run(_launch(file, show, is_detached=True))
    except CliError as error:
        show(Event("failed", str(error), exit_code=error.exit_code))
        return error.exit_code


def start_detached(file: str | None, *, name: str | None, port: int | None) -> Started | None:
    """Start a fleet whose launcher is a daemon; return once it serves, or None if it was stopped while starting.

    Raises CliError with the launcher's own sentence if it does not come up; nothing of it is left then.
    """
    reader, writer = os.pipe()
    command = [sys.executable, "-P", "-m", "callboard.tools.cli", "up", "--events-fd", str(writer)]
    command += [file] if file is not None else []
    command += ["--name", name] if name is not None else []
    command += ["--port", str(port)] if port is not None else []
    # Until it has a log of its own, the daemon speaks to this terminal.
    daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[writer], start_new_session=True)
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
        raise StartFailed(f"the launcher ended with exit code {code} before the fleet was up")
    except KeyboardInterrupt:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait()
        raise


def _failure(event: Event) -> CliError:
    error = CliError(event.text)
    error.exit_code = event.exit_code
    return error
