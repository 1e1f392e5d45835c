"""Where the logs of fleets that failed are kept (actors/kept_logs.py): ``$XDG_STATE_HOME/callboard/failed/NAME``."""

import os
from pathlib import Path

from .errors import CliError


def kept_at(name: str) -> Path:
    """Return the directory for the logs of a fleet of that name. It may not be there."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "callboard" / "failed" / name


def find_kept(name: str | None) -> Path:
    """Return the kept logs of a fleet, without a name those of the last one that failed. Raises CliError."""
    root = kept_at("any").parent
    folders = sorted(root.iterdir(), key=lambda path: path.stat().st_mtime) if root.is_dir() else []
    if name is not None:
        folders = [folder for folder in folders if folder.name == name]
    if not folders:
        whose = "fleet" if name is None else f'fleet "{name}"'
        raise CliError(f"no logs are kept: no {whose} has failed")
    return folders[-1]
