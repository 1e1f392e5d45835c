"""The fleet file's models as directories: found at once, or converted or fetched in a process of its own."""

import asyncio
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from callboard.actors.embedded_model import ModelMissing, Progress, cached_directory, is_converted, locate

from .errors import StartFailed
from .fleet_file import FleetFile
from .progress import Event, Show


async def resolve_models(
    file: FleetFile, *, cache: Path, log: Path, environment: Mapping[str, str], show: Show
) -> dict[str, Path]:
    """Return the directory of every model in ``file``. Raises StartFailed with a sentence."""
    loop = asyncio.get_running_loop()
    found: dict[str, Path] = {}
    for name, model in file.fleet.models.items():
        try:
            ready, path = await loop.run_in_executor(None, _at_hand, model.path, file.base, cache)
            found[name] = ready or await _resolve(name, path, cache, log, environment, show)
        except ModelMissing as error:
            raise StartFailed(f"model {name}: {error}") from None
    return found


def _at_hand(path: str, base: Path, cache: Path) -> tuple[Path | None, str]:
    """Return the directory if nothing has to be done for it, and what to resolve otherwise."""
    local = locate(path, base=base)
    if local is None or local.is_dir():
        return local, path
    target = cached_directory(local, cache)
    return target if is_converted(target) else None, str(local)


def _last_line(log: Path) -> str:
    return "".join(log.read_text(errors="replace").strip().splitlines()[-1:])


async def _resolve(name: str, path: str, cache: Path, log: Path, environment: Mapping[str, str], show: Show) -> Path:
    with log.open("ab") as errors:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "callboard.actors.embedded_model", path, str(cache)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            env={**environment, "TQDM_DISABLE": "1"},
            start_new_session=True,
        )
    assert process.stdout is not None
    try:
        async for line in process.stdout:
            progress = msgspec.json.decode(line, type=Progress)
            if progress.doing is not None:
                show(Event("step", f"model {name}: {progress.doing}"))
            if progress.failed is not None:
                raise ModelMissing(progress.failed)
            if progress.path is not None:
                return Path(progress.path)
    finally:
        if process.returncode is None:
            try:
                process.kill()
            except ProcessLookupError:
                pass
        await process.wait()
    raise ModelMissing(f"reading {path} failed: {_last_line(log)}")
