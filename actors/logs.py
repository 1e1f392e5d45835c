"""A node's log: one event a line, as JSON, with the request that it belongs to.

Nothing is logged of a request that went well. Prompts, answers and keys are never in a line.
"""

import logging
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from callboard.bus import current_call

LEVELS = ("debug", "info", "warning", "error")
CHATTY = (
    *("asyncio", "filelock", "fsspec", "httpcore", "httpx", "huggingface_hub", "litestar"),
    *("torch", "transformers", "urllib3", "uvicorn"),
)
"""Libraries that are heard from warnings on, whatever the level."""
MOST_EVENT, MOST_ERROR = 8_000, 32_000
"""Characters of an event and of a traceback; of a longer one, the beginning and the end."""
MOST_NAME = 300
"""The same of an actor and of a request's id, which is a peer's to choose."""
MOST_BYTES = 16 << 20
"""Of a log file; then it begins anew, and what was in it stays once as FILE.1."""
LOOK_BYTES = 1 << 16
"""How much is written between two looks at the file's size."""


class Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """One event, as it stands in a log."""

    time: str
    """UTC, as in 2026-11-22T01:33:29.123456Z."""
    level: str
    node: str
    event: str
    logger: str = ""
    actor: str = ""
    """Whose handler it happened in."""
    request_id: str = ""
    error: str = ""
    """The traceback of what was raised, all of it."""


class WhoseFilter(logging.Filter):
    """Adds ``actor`` and ``request_id`` of the call being served; a record that names a request itself keeps that."""

    def filter(self, record: logging.LogRecord) -> bool:
        call = current_call()
        record.actor = getattr(record, "actor", "") or ("" if call is None else getattr(call, "actor", ""))
        record.request_id = getattr(record, "request_id", "") or ("" if call is None else call.request_id)
        return True


class LineFormatter(logging.Formatter):
    """Makes a Line of a record, as JSON."""

    def __init__(self, node: str) -> None:
        super().__init__()
        self._node = node

    def format(self, record: logging.LogRecord) -> str:
        try:
            event = record.getMessage()
        except Exception as misfit:  # Words that do not fit their format: the line is still worth having.
            event = f"{record.msg} (with {record.args!r}: {misfit})"
        error = self.formatException(record.exc_info) if record.exc_info and record.exc_info[0] else ""
        if record.stack_info:
            error += ("\n" if error else "") + record.stack_info
        line = Line(
            datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "error" if record.levelno > logging.ERROR else record.levelname.lower(),
            self._node,
            _cut(event, MOST_EVENT),
            record.name,
            _cut(str(getattr(record, "actor", "")), MOST_NAME),
            _cut(str(getattr(record, "request_id", "")), MOST_NAME),
            _cut(error, MOST_ERROR),
        )
        try:
            return msgspec.json.encode(line).decode()
        except UnicodeEncodeError:  # Half of a character, as in a name of a file.
            texts = {key: _whole(value) for key, value in msgspec.structs.asdict(line).items()}
            return msgspec.json.encode(Line(**texts)).decode()


class FileHandler(logging.Handler):
    """Writes each line whole, and at once: a process that is killed leaves no half of it.

    ``fd`` is open for appending to the file at ``path``, and may be written by others, too.
    """

    def __init__(self, fd: int, path: Path) -> None:
        super().__init__()
        self._fd = fd
        self._path = path
        self._num_unseen = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            data = self.format(record).encode() + b"\n"
            os.write(self._fd, data)
            self._num_unseen += len(data)
            if self._num_unseen >= LOOK_BYTES:
                self._num_unseen = 0
                if os.fstat(self._fd).st_size >= MOST_BYTES:
                    self._begin_anew()
        except OSError:
            pass  # A full disk, or a run directory that is gone: the node serves on.

    def _begin_anew(self) -> None:
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
            with self._path.open("rb") as reader, open(os.open(f"{self._path}.1", flags, 0o600), "wb") as writer:
                shutil.copyfileobj(reader, writer)
        finally:  # Also where there is no room for a second file: this one does not grow for ever.
            os.ftruncate(self._fd, 0)


def log_to(fd: int, path: Path, *, node: str, level: str) -> None:
    """Let all that is logged in this process from ``level`` on go to ``fd``, which appends to the file at ``path``."""
    handler = FileHandler(fd, path)
    handler.setFormatter(LineFormatter(node))
    handler.addFilter(WhoseFilter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in CHATTY:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    logging.captureWarnings(True)


def _cut(text: str, most: int) -> str:
    """Return ``text``, without its middle if it is too long."""
    return text if len(text) <= most else f"{text[: most // 2]} [...] {text[-most // 2 :]}"


def _whole(text: str) -> str:
    return text.encode(errors="replace").decode()
