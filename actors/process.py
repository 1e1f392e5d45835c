"""One node's process: ``python -m callboard.actors.process``, started by a supervisor, never by hand.

Standard input is the tie to the launcher: its first line is the NodeSpec, its end is the launcher's death. Standard
output carries Status lines. Standard error is the node's log.
"""

import asyncio
import functools
import gc
import importlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec

from callboard.bus import BusError, LinkConfig, Node
from callboard.bus.keys import FleetKeys
from callboard.bus.tasks import Tasks

from .actor import Actor, start_actor, stop_actor
from .kept_logs import keep_logs
from .logs import log_to
from .node_spec import ActorSpec, NodeSpec, Status
from .parent import die_with_parent
from .protocol import Entry
from .registration import Registration
from .run_dir import remove_run_dir
from .trace_protocol import TRACER
from .tracer import Tracer

log = logging.getLogger("callboard.process")

MAX_DETAIL = 2000
"""Characters of a sentence that the launcher is told."""
HANG_S = 5.0


class CannotStart(Exception):
    """An actor that cannot be made; the text is a sentence for people."""


class Resident(Actor):
    """Keeps a user's actor, any object with ``on_*`` handlers, in the directory."""

    def __init__(self, actor_name: str) -> None:
        self.actor_name = actor_name

    async def start(self) -> None:
        address = self.node.address_of(self.actor_name)
        self.registration = Registration(self, Entry(self.actor_name, "actor", address, pid=os.getpid()))


class Reporter:
    """Writes Status lines to the launcher; a launcher that is gone is no error."""

    def __init__(self, fd: int) -> None:
        self.has_been_ready = False
        self._fd = fd

    def __call__(self, state: Any, detail: str = "", *, node: str = "", incarnation: str = "") -> None:
        self.has_been_ready |= state == "ready"
        try:
            # A line that the launcher can read whatever was raised here: of bounded length, and of characters.
            detail = detail[:MAX_DETAIL].encode(errors="replace").decode()
            os.write(self._fd, msgspec.json.encode(Status(state, detail, node, incarnation)) + b"\n")
        except OSError:
            pass


def load_class(spec: ActorSpec) -> Any:
    """Import an actor's class. Raises CannotStart."""
    module_name, _, class_name = spec.class_path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name + ".").startswith(error.name + "."):
            raise CannotStart(f"there is no module {module_name}") from None
        raise CannotStart(f'{module_name} needs the module {error.name}: run "pip install {error.name}"') from error
    found = getattr(module, class_name, None)
    if found is None:
        raise CannotStart(f"module {module_name} has no class {class_name}")
    if not isinstance(found, type):
        raise CannotStart(f"{class_name} in module {module_name} is no class")
    return found


def describe(error: Exception, spec: NodeSpec) -> str:
    """Return what people are told of a failure: a sentence of ours as it is, else what was raised, and where."""
    text = str(error)
    is_sentence = bool(text) and not isinstance(error, KeyError)
    if isinstance(error, CannotStart | BusError) or (is_sentence and spec.kind != "actor"):
        return text
    found = f"{type(error).__name__}: {text}"
    own = spec.python_path
    frames = [] if own is None else [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(own)]
    return f"{found} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else found


def make_actor(kind: Any, config: dict[str, Any]) -> Any:
    """Make an actor with its ``Config``, or with ``config`` as keywords where it has none. Raises CannotStart."""
    settings = getattr(kind, "Config", None)
    try:
        if isinstance(settings, type) and issubclass(settings, msgspec.Struct):
            return kind(msgspec.convert(config, settings, strict=True))
        return kind(**config)
    except (msgspec.ValidationError, TypeError) as error:
        log.exception("cannot make %s", kind.__name__)
        raise CannotStart(f"{kind.__name__} does not take these options: {error}") from error


async def _start(
    node: Node,
    spec: NodeSpec,
    actors: list[tuple[ActorSpec, Any]],
    stack: AsyncExitStack,
    report: Callable[..., object],
) -> None:
    def ask_to_kill(name: str, incarnation: str, why: str) -> None:
        log.warning("asking the launcher to kill %s: %s", name, why)
        report("kill", why, node=name, incarnation=incarnation)

    def last_words(words: str) -> None:
        report("failed", words)

    directory = None if spec.directory is None else node.ref(spec.directory)
    tracer = Tracer(Tracer.Config(spec.trace.keep, spec.trace.prompts))
    await start_actor(node, TRACER, tracer)
    stack.push_async_callback(stop_actor, tracer)
    for actor_spec, actor in actors:
        if not isinstance(actor, Actor):
            node.add(actor_spec.name, actor)
        else:
            if spec.kind == "kv_manager":
                actor.ask_to_kill = ask_to_kill
            if spec.kind in ("router", "control"):
                actor.last_words = last_words
            await start_actor(node, actor_spec.name, actor, directory=directory, host=spec.host)
            stack.push_async_callback(stop_actor, actor)
        if spec.kind == "actor" and not any(
            isinstance(value, Registration) for value in getattr(actor, "__dict__", {}).values()
        ):
            resident = Resident(actor_spec.name)
            await start_actor(node, f"{actor_spec.name}.resident", resident, directory=directory, host=spec.host)
            stack.push_async_callback(stop_actor, resident)


async def serve(
    spec: NodeSpec,
    actors: list[tuple[ActorSpec, Any]],
    stop: asyncio.Event,
    report: Callable[..., object],
    *,
    make_node: Callable[..., Node] = Node,
) -> bool:
    """Run a node until ``stop`` is set or an actor breaks; return whether all went well."""
    crashes: list[str] = []

    def on_crash(name: str, error: BaseException) -> None:
        crashes.append(f"{name}: {type(error).__name__}: {error}")
        stop.set()

    tasks = Tasks(lambda error: None)  # What fails in them is raised where they are awaited.
    options = {} if spec.keys is None else {"keys": FleetKeys(spec.keys, spec.fleet)}
    node = make_node(spec.name, endpoint=spec.endpoint, fleet=spec.fleet, on_crash=on_crash, **options)
    async with node, AsyncExitStack() as stack:
        try:
            starting, stopping = tasks.spawn(_start(node, spec, actors, stack, report)), tasks.spawn(stop.wait())
            await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                await starting
                report("ready", incarnation=node.incarnation)
                log.info("ready")
            await stopping
            log.info("stopping%s", f" ({crashes[0]})" if crashes else "")
        finally:
            await tasks.cancel()
            if crashes:
                report("failed", crashes[0])  # Before the stop, which may break on what is broken already.
    return not crashes


class LauncherWatch:
    """A thread that waits for the launcher's end of standard input to close, then ends this process.

    It asks the loop first, and where that hangs (or has not begun) it leaves without it, after HANG_S at the latest.
    """

    def __init__(self, spec: NodeSpec, fd: int) -> None:
        self.is_orphan = False
        self._spec = spec
        self._fd = fd
        self._stop: Callable[[], object] | None = None
        threading.Thread(target=self._watch, name="launcher-watch", daemon=True).start()

    def ask(self, stop: Callable[[], object]) -> None:
        """Call ``stop`` from the thread when the launcher is gone; at once if it is already."""
        self._stop = stop
        if self.is_orphan:
            stop()

    def _watch(self) -> None:
        try:
            while os.read(self._fd, 4096):
                pass
        except OSError:
            pass
        log.warning("the launcher is gone")
        self.is_orphan = True
        if self._stop is not None:
            try:
                self._stop()
            except RuntimeError:
                pass  # The loop has ended already.
            threading.Event().wait(HANG_S)
        self.remove_run_dir()
        os._exit(1)

    def remove_run_dir(self) -> None:
        """Remove the run directory, where that is this node's duty. Its lock goes last: then it may be made anew."""
        if self._spec.removes is not None:
            if self._spec.keeps_logs_at is not None:
                keep_logs(Path(self._spec.removes) / "logs", Path(self._spec.keeps_logs_at))
            remove_run_dir(Path(self._spec.removes))


def _tie_to_launcher(spec: NodeSpec) -> None:
    if spec.cores:
        os.sched_setaffinity(0, spec.cores)
    if spec.dies_with_launcher:
        die_with_parent()
    if spec.python_path is not None:
        sys.path.insert(0, spec.python_path)
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2:
            try:
                os.set_inheritable(fd, False)
            except OSError:
                pass  # The descriptor that listed them.


async def _main(spec: NodeSpec, actors: list[tuple[ActorSpec, Any]], watch: LauncherWatch, report: Reporter) -> int:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    watch.ask(lambda: loop.call_soon_threadsafe(stop.set))
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    report("loading")

    def tell(state: str, *more: str, **named: str) -> None:
        if state == "ready":  # What is loaded by now stays: full collections, which stop the loop, need not walk it.
            gc.collect()
            gc.freeze()
        report(state, *more, **named)

    try:
        links = LinkConfig(ping_s=min(1.0, spec.silent_s / 5), silent_s=spec.silent_s)
        is_good = await serve(spec, actors, stop, tell, make_node=functools.partial(Node, links=links))
        if stop.is_set() and not report.has_been_ready:
            # A thread that reads a model cannot be stopped, and the end of the loop would wait for it.
            if watch.is_orphan:
                watch.remove_run_dir()
            os._exit(0 if is_good else 1)
        return 0 if is_good else 1
    except Exception as error:
        log.exception("failed")
        report("failed", describe(error, spec))
        return 1


def main() -> int:
    """Run the node that standard input describes; return the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    launcher, reports = os.dup(0), os.dup(1)
    report = Reporter(reports)
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(launcher, 1 << 16)
        if not piece:
            return 1
        line += piece
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    spec = msgspec.json.decode(line, type=NodeSpec)
    log_to(2, Path(spec.log), node=spec.name, level=spec.log_level)
    watch = LauncherWatch(spec, launcher)
    report("starting")
    _tie_to_launcher(spec)
    try:
        actors = [(each, make_actor(load_class(each), each.config)) for each in spec.actors]
    except Exception as error:
        log.exception("cannot start")
        report("failed", describe(error, spec))
        return 1
    import uvloop

    code = uvloop.run(_main(spec, actors, watch, report))
    if watch.is_orphan:
        watch.remove_run_dir()
    return code


if __name__ == "__main__":
    sys.exit(main())
