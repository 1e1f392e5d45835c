"""What a further engine is called, where it runs, and which nodes it needs; and what cannot be."""

from pathlib import Path
from typing import Any

import pytest

from callboard.tools.errors import CliError
from callboard.tools.fleet_file import FleetFile, decode_fleet_file
from callboard.tools.gpus import NO_GPUS
from callboard.tools.growing import Growth, grow
from callboard.tools.launcher_calls import AddEngines
from callboard.tools.plan import Machine, Plan, Planner
from callboard.tools.role import parse_roles

GIB = 1 << 30
TWO = """\
name = "demo"
[models.tiny]
path = "model"
max_model_len = 256
[defaults.kv]
size = "1MiB"
[[engine]]
name = "prefill"
roles = ["prefill"]
device = "cpu:0"
[[engine]]
name = "decode"
roles = ["decode"]
device = "cpu:1"
{more}
"""
NODES = ("control", "kv-cpu0", "kv-cpu1", "prefill", "decode")


def grown(place: Any, call: AddEngines, *, more: str = "", taken: tuple[str, ...] = NODES) -> Growth:
    file = decode_fleet_file(TWO.format(more=more), source="fleet.toml", base=place.folder)
    return grow(file, call, host="", taken=taken, gpus=NO_GPUS, plan=lambda part: plan_of(place, part))


def plan_of(place: Any, file: FleetFile) -> Plan:
    models = {"tiny": place.folder / "model"}
    return Planner(file, run_dir=Path("/run/x"), models=models, machine=Machine((2, 5), GIB), port=1).plan()


def test_it_has_a_number_a_device_and_a_manager_of_its_own(place: Any) -> None:
    place.model()
    growth = grown(place, AddEngines("decode"))
    assert [[node.name for node in stage] for stage in growth.stages] == [["kv-cpu2"], ["decode-1"]]
    (engine,) = growth.stages[1][0].actors
    assert (engine.config["roles"], engine.config["device"]) == (["decode"], "cpu:2")
    assert engine.config["manager"][2] == "kv-cpu2"
    assert growth.memory.pools == 1 << 20
    assert growth.warnings == ("cpu:2 shares core 2: there are only 2 cores here",)


def test_several_are_numbered_on_and_the_next_ones_after_them(place: Any) -> None:
    place.model()
    growth = grown(place, AddEngines("decode", count=2))
    assert [engine.name for engine in growth.engines] == ["decode-1", "decode-2"]
    assert [engine.device for engine in growth.engines] == ["cpu:2", "cpu:3"]
    again = grow(
        growth.file,
        AddEngines("decode-1"),
        host="",
        taken=(*NODES, "decode-1", "decode-2", "kv-cpu2", "kv-cpu3"),
        gpus=NO_GPUS,
        plan=lambda part: plan_of(place, part),
    )
    assert [(engine.name, engine.device) for engine in again.engines] == [("decode-3", "cpu:4")]


def test_frontends_that_are_there_are_neither_planned_nor_counted_again(place: Any) -> None:
    place.model()
    more = "[listen]\nfrontends = 3"
    growth = grown(place, AddEngines("decode"), more=more, taken=(*NODES, "frontend-0", "frontend-1", "frontend-2"))
    assert [node.name for stage in growth.stages for node in stage] == ["kv-cpu2", "decode-1"]
    assert growth.memory == grown(place, AddEngines("decode")).memory
    assert growth.file.fleet.listen.frontends == 3
    with pytest.raises(CliError, match='"frontend-1" is taken'):
        grown(place, AddEngines("decode", name="frontend-1"), more=more)


def test_on_a_device_that_has_a_manager_it_shares_the_pool(place: Any) -> None:
    place.model()
    growth = grown(place, AddEngines("decode", name="spare", device="cpu:1"))
    assert [[node.name for node in stage] for stage in growth.stages] == [["spare"]]
    assert growth.memory.pools == 0


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (AddEngines("decoed"), 'there is no engine "decoed" to be like: did you mean "decode"?'),
        (AddEngines("control"), 'there is no engine "control" to be like'),
        (AddEngines("decode", name="kv-cpu0"), 'the fleet has a "kv-cpu0" already'),
        (AddEngines("decode", name="frontend"), 'the name "frontend" is taken'),
        (AddEngines("decode", name="far", taken=("far",)), 'the fleet has a "far" already'),
        (AddEngines("decode", name=""), '"" is no name'),
        (AddEngines("decode", name="../x"), '"../x" is no name'),
        (AddEngines("decode", name="x" * 41), "is no name"),
        (AddEngines("decode", device="cuda:0"), "cuda:0"),
        (AddEngines("decode", device="tpu"), '"tpu" is no device'),
        (AddEngines("decode", count=65), "--count 65: give 1 to 64"),
        (AddEngines("decode", count=-1), "--count -1: give 1 to 64"),
    ],
)
def test_what_cannot_be_is_one_sentence(place: Any, call: AddEngines, sentence: str) -> None:
    place.model()
    with pytest.raises(CliError) as refused:
        grown(place, call)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "roles"),
    [
        (["both"], ("prefill", "decode")),
        (["decode", "both"], ("decode", "prefill")),
        (["prefill,decode"], ("prefill", "decode")),
        (["chat"], ("chat",)),
    ],
)
def test_roles_are_words_or_labels(words: list[str], roles: tuple[str, ...]) -> None:
    assert parse_roles(words) == roles


@pytest.mark.parametrize("word", ["prefil", "decod", "Both", "a/b", ""])
def test_words_that_are_no_roles_are_refused(word: str) -> None:
    with pytest.raises(CliError):
        parse_roles([word])
