"""``callboard init`` and ``callboard check``: write a fleet file to start from, and validate one."""

import argparse
import re
from pathlib import Path

from .default_fleet import default_fleet
from .endpoints import IPC
from .errors import CliError
from .fleet_check import check_fleet, engine_names, router_names
from .fleet_file import load_fleet_file


def run(arguments: argparse.Namespace) -> int:
    """Write the commented default fleet file. Raises CliError rather than overwrite one."""
    path = Path(arguments.file)
    if path.exists() and not arguments.force:
        raise CliError(f"{path} exists already: pass --force to overwrite it, or give another name")
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", path.absolute().parent.name).strip("-._")[:40] or "demo"
    try:
        path.write_text(default_fleet(name=name, file=str(path)), encoding="utf-8")
    except OSError as error:
        raise CliError(f"cannot write {path}: {error.strerror}") from None
    print(f"Wrote {path}. Next: callboard check {path}, callboard up {path}")
    return 0


def run_check(arguments: argparse.Namespace) -> int:
    """Print what the fleet file makes. Raises FleetFileError with all its problems."""
    file = load_fleet_file(Path(arguments.file))
    check_fleet(file)
    fleet = file.fleet
    print(f"OK: {arguments.file} makes the fleet {fleet.name}")
    if fleet.engine:
        several = f", {fleet.listen.frontends} frontends" if fleet.listen.frontends > 1 else ""
        print(f"  http     {fleet.listen.http}{several}")
    if fleet.listen.bus != IPC or fleet.listen.keys is not None:
        print(f"  bus      {fleet.listen.bus}, {'without keys' if fleet.listen.keys is None else 'with keys'}")
    for name, model in fleet.models.items():
        print(f"  model    {name} ({model.path})")
    for engine in fleet.engine:
        for name in engine_names(engine):
            where = f" of host {engine.host}" if engine.host else ""
            print(f"  engine   {name} on {engine.device}{where}, {' and '.join(engine.roles)}")
    for router in fleet.router:
        for name in router_names(router):
            print(f"  router   {name} runs {router.script}")
    for actor in fleet.actor:
        print(f"  actor    {actor.name} is {actor.class_path}")
    return 0
