"""Tiers in a fleet file: what is wrong with them is said with its line and remedy, and what the managers are told."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from callboard.actors.kv_manager import KvManager
from callboard.actors.model_config import fingerprint_of
from callboard.tools.errors import FleetFileError
from callboard.tools.fleet_check import check_fleet
from callboard.tools.fleet_file import decode_fleet_file
from callboard.tools.plan import Machine, Plan, Planner

FLEET = """\
name = "demo"
[models.tiny]
path = "model"
[defaults.kv]
size = "1MiB"
tiers = [{tiers}]
[[engine]]
name = "prefill"
device = "cpu:0"
[[engine]]
name = "decode"
device = "cpu:1"
"""
DISK = '{ kind = "disk", path = "cache", size = "8GiB" }'
HOST = '{ kind = "host", size = "25%" }'
BAD = [
    ('{ kind = "disc", path = "cache", size = "1GiB" }', 'kind must be "host" or "disk", not "disc"'),
    ('{ path = "cache", size = "1GiB" }', '[defaults.kv.tiers] lacks kind: add kind = "disk"'),
    ('{ kind = "disk", path = "cache" }', '[defaults.kv.tiers] lacks size: add size = "8GiB"'),
    ('{ kind = "disk", size = "1GiB" }', 'a tier of kind "disk" needs a directory: write for example path = "cache"'),
    ('{ kind = "disk", path = "", size = "1GiB" }', 'write for example path = "cache"'),
    ('{ kind = "disk", path = 7, size = "1GiB" }', "path must be a string, not 7"),
    ('{ kind = "host", path = "cache", size = "1GiB" }', "a tier in host memory has no path: remove it"),
    ('{ kind = "host", size = "much" }', '"much" is no size'),
    ('{ kind = "host", size = 0 }', "a tier must have room for some blocks"),
    ('{ kind = "host", size = "1KiB" }', "a tier of 1.0 KiB does not hold one block of 8.0 KiB: raise size"),
    ('{ kind = "disk", path = "cache", size = "8KiB" }', "a tier of 8.0 KiB does not hold one block of 8.2 KiB"),
    ('{ kind = "host", sise = "1KiB" }', 'did you mean "size"?'),
    (f"{HOST}, {HOST}", 'there can be one tier of kind "host": make that one larger'),
    ('{ kind = "disk", path = "notes.txt", size = "1GiB" }', "notes.txt is no directory: name a"),
    ('{ kind = "disk", path = "notes.txt/x", size = "1GiB" }', "notes.txt: name a directory where you may write"),
    ('{ kind = "disk", path = "open", size = "1GiB" }', "run chmod 700"),
    ('{ kind = "disk", path = "home", size = "1GiB" }', "for blocks alone: name a directory that is not there yet"),
]


def make(tiers: str, place: Any) -> Plan:
    file = decode_fleet_file(FLEET.replace("{tiers}", tiers), source="fleet.toml", base=place.folder)
    check_fleet(file)
    machine = Machine((0, 1), 4 << 30)
    models = {"tiny": place.folder / "model"}
    return Planner(file, run_dir=Path("/run/x"), models=models, machine=machine, port=8123).plan()


def managers(plan: Plan) -> list[KvManager.Config]:
    configs = [node.actors[0].config for node in plan.nodes if node.kind == "kv_manager"]
    return [msgspec.convert(config, KvManager.Config) for config in configs]


@pytest.mark.parametrize(("tiers", "words"), BAD, ids=[case[1] for case in BAD])
def test_bad_tiers_are_refused_with_line_and_remedy(place: Any, tiers: str, words: str) -> None:
    place.model()
    place.write("", "notes.txt")
    (place.folder / "open").mkdir(mode=0o755)
    (place.folder / "open").chmod(0o755)
    (place.folder / "home" / "notes").mkdir(parents=True)
    (place.folder / "home").chmod(0o755)
    with pytest.raises(FleetFileError) as caught:
        make(tiers, place)
    assert [problem for problem in caught.value.problems if words in problem and problem.startswith("fleet.toml:6: ")]
    assert not (place.folder / "cache").exists()


def test_tiers_that_are_no_list_are_told_how_to_be_written(place: Any) -> None:
    place.model()
    file = FLEET.replace("tiers = [{tiers}]", f"tiers = {HOST}")
    with pytest.raises(FleetFileError, match=r"write \[\[defaults.kv.tiers\]\] with double brackets"):
        decode_fleet_file(file, source="fleet.toml", base=place.folder)


def test_every_manager_is_told_of_the_tiers_and_all_share_the_directory(place: Any) -> None:
    place.model()
    plan = make(f"{HOST}, {DISK}", place)
    for config in managers(plan):
        host, disk = config.tiers
        assert (host.kind, host.num_bytes, host.path) == ("host", 1 << 30, "")
        assert (disk.kind, disk.num_bytes, disk.path) == ("disk", 8 << 30, str(place.folder.resolve() / "cache"))
    assert plan.memory.pools == 2 * ((1 << 30) + (1 << 20))


def test_a_link_to_a_directory_is_followed_when_the_fleet_starts_and_never_again(place: Any) -> None:
    place.model()
    (place.folder / "target").mkdir(mode=0o700)
    (place.folder / "cache").symlink_to("target")
    assert managers(make(DISK, place))[0].tiers[0].path == str(place.folder.resolve() / "target")


def test_a_models_fingerprint_changes_with_whatever_changes_its_kv(place: Any) -> None:
    model = place.model()
    first = fingerprint_of(model, dtype="float32")
    assert first == fingerprint_of(model, dtype="float32")
    assert managers(make(DISK, place))[0].fingerprint == first
    others = [fingerprint_of(model, dtype="bfloat16"), fingerprint_of(model, dtype="float32", runner="simulated")]
    (model / "model.safetensors").write_bytes(b"other weights")
    others.append(fingerprint_of(model, dtype="float32"))
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    others.append(fingerprint_of(model, dtype="float32"))
    others.append(fingerprint_of(place.model("copy"), dtype="float32"))
    assert len({first, *others}) == 6
