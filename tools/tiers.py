"""The tiers of a fleet file: whether they make sense, and what each KV manager is told of them."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from callboard.bus.private import why_open
from callboard.kv.layout import KvLayout
from callboard.kv.tiers import TierSpec, least_bytes

from .fleet_file import FleetFile, Problem, Tier
from .toml_lines import Path as KeyPath
from .units import format_size, parse_size

PATH: KeyPath = ("defaults", "kv", "tiers")


def check_tiers(file: FleetFile) -> Iterator[Problem]:
    """Yield what is wrong with the tiers of a fleet file; changes nothing."""
    kinds: set[str] = set()
    for index, tier in enumerate(file.fleet.defaults.kv.tiers):
        path = (*PATH, index)
        if tier.kind in kinds:
            yield Problem((*path, "kind"), f'there can be one tier of kind "{tier.kind}": make that one larger')
        kinds.add(tier.kind)
        try:
            size = parse_size(tier.size, whole=1 << 40)
        except ValueError as error:
            yield Problem((*path, "size"), f"size: {error}")
        else:
            if size <= 0:
                yield Problem((*path, "size"), 'a tier must have room for some blocks: write for example size = "8GiB"')
        if tier.kind == "host" and tier.path is not None:
            yield Problem((*path, "path"), "a tier in host memory has no path: remove it")
        if tier.kind == "disk":
            yield from _check_directory(file, tier, path)


def tier_directory(file: FleetFile, tier: Tier) -> Path:
    """Return where a disk tier is: what is no absolute path is one in the fleet file's directory."""
    assert tier.path is not None
    return (file.base / Path(tier.path).expanduser()).resolve()


def tier_specs(file: FleetFile, layout: KvLayout, *, total_memory: int) -> list[TierSpec]:
    """Return what the manager of a pool is told. Raises FleetFileError for a tier that does not hold a block."""
    specs = []
    for index, tier in enumerate(file.fleet.defaults.kv.tiers):
        directory = tier_directory(file, tier) if tier.kind == "disk" else None
        size = parse_size(tier.size, whole=total_memory if directory is None else _disk_bytes(directory))
        if size < (least := least_bytes(tier.kind, layout)):
            sentence = f"a tier of {format_size(size)} does not hold one block of {format_size(least)}: raise size"
            file.report([Problem((*PATH, index, "size"), sentence)])
        specs.append(TierSpec(tier.kind, size, "" if directory is None else str(directory)))
    return specs


def _check_directory(file: FleetFile, tier: Tier, path: KeyPath) -> Iterator[Problem]:
    if not tier.path:
        yield Problem(path, 'a tier of kind "disk" needs a directory: write for example path = "cache"')
        return
    try:
        reason = _why_not_in(tier_directory(file, tier))
    except OSError as error:
        reason = f"cannot look at {tier.path} ({(error.strerror or str(error)).lower()}): name another directory"
    if reason:
        yield Problem((*path, "path"), f"path: {reason}")


def _why_not_in(directory: Path) -> str:
    """Return why blocks cannot be kept there, and what to do; empty if they can. Raises OSError."""
    if not directory.exists():  # It is made when the fleet starts.
        there = next(parent for parent in directory.parents if parent.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            return f"{directory} cannot be made in {there}: name a directory where you may write"
        return ""
    other = "name a directory that is not there yet"
    if not directory.is_dir():
        return f"{directory} is no directory: {other}"
    reason = why_open(directory, directory.stat())
    if reason and any(each.suffix != ".kv" for each in directory.iterdir()):
        # Nobody should close /etc to the others because of us.
        return f"others can read {directory}, and it is not for blocks alone: {other}"
    return reason and f"{reason}, or {other}"


def _disk_bytes(directory: Path) -> int:
    """Return the size of the file system that a directory is on, or will be."""
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).total
