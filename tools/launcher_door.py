"""The launcher's own door: a socket in the run directory, at which commands ask for more engines, and for restarts."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from .errors import CliError
from .launcher_calls import MOST_BYTES, Call, Said, socket_path

log = logging.getLogger("callboard.launcher")

Say = Callable[[str], None]
Serve = Callable[[Call, Say], Awaitable[Said]]


@asynccontextmanager
async def launcher_door(folder: Path, serve: Serve) -> AsyncIterator[None]:
    """Take calls inside of the context, several at once. ``serve(call, say)`` raises CliError for what cannot be.

    What must not happen at once is for ``serve`` to know.
    """
    serving: set[asyncio.Task[None]] = set()

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        try:
            await _answer(reader, writer, serve)
        except (OSError, asyncio.CancelledError):
            pass  # Whoever asked has left, or the launcher stops.
        finally:
            serving.discard(task)
            writer.close()

    path = socket_path(folder)
    try:
        server = await asyncio.start_unix_server(on_connection, str(path), limit=MOST_BYTES)
    except OSError as error:  # The fleet can serve without it.
        log.warning("no command can add or restart an engine: cannot listen at %s (%s)", path, error)
        yield
        return
    path.chmod(0o600)
    try:
        yield
    finally:
        server.close()
        for task in serving:
            task.cancel()
        if serving:
            await asyncio.wait(serving)


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, serve: Serve) -> None:
    def write(said: Said) -> None:
        with contextlib.suppress(OSError):
            writer.write(msgspec.json.encode(said) + b"\n")

    try:
        call = msgspec.json.decode(await reader.readline(), type=Call)
    except (msgspec.MsgspecError, ValueError) as error:
        write(Said("failed", f"the launcher does not understand that: {error}", exit_code=2))
    else:
        try:
            write(await serve(call, lambda text: write(Said("step", text))))
        except CliError as error:
            write(Said("failed", str(error), exit_code=error.exit_code))
        except Exception as error:
            log.exception("a call failed")
            write(Said("failed", f"the launcher failed: {error}", exit_code=1))
    await writer.drain()
