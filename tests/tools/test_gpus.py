"""Engines on GPUs, of which there are none here: what is planned for them, and what is said where they cannot be."""

from pathlib import Path
from typing import Any

import pytest

from callboard.kv.cuda_driver import Gpu
from callboard.tools.errors import FleetFileError
from callboard.tools.fleet_check import check_fleet
from callboard.tools.fleet_file import decode_fleet_file
from callboard.tools.gpus import GPU_MANAGER_BYTES, GPU_PROCESS_BYTES, HOST_PROCESS_BYTES, NO_GPUS, Gpus
from callboard.tools.plan import PROCESS_BYTES, Machine, Plan, Planner

GIB = 1 << 30
ONE = Gpus((Gpu(0, "Stand-in", "ab" * 16, 80 * GIB),), "")
TEXT = """\
name = "demo"
[models.tiny]
path = "model"
max_model_len = 256
[defaults.kv]
size = "50%"
[[engine]]
name = "prefill"
roles = ["prefill"]
device = "cuda:0"
[[engine]]
name = "decode"
roles = ["decode"]
device = "cuda:0"
[[engine]]
name = "small"
device = "cpu:1"
"""


def plan(text: str, place: Any, gpus: Gpus = ONE) -> Plan:
    place.model()
    file = decode_fleet_file(text, source="fleet.toml", base=place.folder)
    check_fleet(file, find_gpus=lambda: gpus)
    machine = Machine((2, 5), 4 * GIB, gpus)
    models = {"tiny": place.folder / "model"}
    return Planner(file, run_dir=Path("/run/x"), models=models, machine=machine, port=8123).plan()


def test_engines_of_a_gpu_share_a_pool_that_is_a_share_of_its_memory(place: Any) -> None:
    made = plan(TEXT, place)
    nodes = {node.name: node for node in made.nodes}
    config = nodes["kv-cuda0"].actors[0].config
    block_bytes = 2 * 2 * 16 * 2 * 16 * 2  # layers, halves, tokens, heads, head_dim, bytes of bfloat16
    assert (config["device"], config["num_blocks"]) == ("cuda:0", 40 * GIB // block_bytes)
    assert config["layout"]["dtype"] if isinstance(config["layout"], dict) else config["layout"][-1] == "bfloat16"
    assert nodes["kv-cuda0"].pool_bytes is None, "the manager makes that memory itself"
    assert nodes["kv-cpu1"].pool_bytes is not None
    assert {nodes[name].actors[0].config["manager"][2] for name in ("prefill", "decode")} == {"kv-cuda0"}


def test_engines_on_gpus_compute_in_bfloat16_and_are_not_pinned(place: Any) -> None:
    nodes = {node.name: node for node in plan(TEXT, place).nodes}
    engine = nodes["prefill"].actors[0].config
    assert (engine["device"], engine["dtype"], engine["num_threads"]) == ("cuda:0", "bfloat16", 1)
    assert nodes["prefill"].cores == ()
    assert (nodes["small"].actors[0].config["dtype"], nodes["small"].cores) == ("float32", (5,))


def test_what_lies_on_a_gpu_is_no_memory_of_the_machine(place: Any) -> None:
    made = plan(TEXT, place)
    assert made.memory.pools <= 2 * GIB
    assert made.memory.weights == 1 << 20, "those of the engine on a CPU"
    assert made.memory.processes == 2 * HOST_PROCESS_BYTES + PROCESS_BYTES


def test_a_pool_that_leaves_no_room_for_its_engines_is_refused(place: Any) -> None:
    with pytest.raises(FleetFileError, match=r"fleet.toml:6: cuda:0 \(Stand-in\) has 80.0 GiB; a pool of .* 2 engines"):
        plan(TEXT.replace("50%", "99%"), place)
    room = (80 * GIB - 2 * GPU_PROCESS_BYTES - GPU_MANAGER_BYTES) / (80 * GIB)
    plan_of_most = TEXT.replace("50%", f"{int(100 * room)}%")
    file = decode_fleet_file(plan_of_most, source="fleet.toml", base=place.folder)
    machine = Machine((0,), GIB, ONE)
    models = {"tiny": place.folder / "model"}
    Planner(file, run_dir=Path("/run/x"), models=models, machine=machine, port=1).plan()


@pytest.mark.parametrize(
    ("text", "gpus", "words"),
    [
        (TEXT, Gpus(problem="the driver is missing"), r"fleet.toml:10: .*\(the driver is missing\): write device = "),
        (TEXT.replace("cuda:0", "cuda:1"), ONE, r"there is no such GPU here, write one of cuda:0 \(Stand-in\)"),
        (TEXT.replace("cuda:0", "cuda"), ONE, r'"cuda" is no device: write "cuda:0" for the first GPU'),
        (TEXT.replace("[defaults.kv]", '[defaults.kv]\ntransport = "shm"'), ONE, "does not lead into a pool on a GPU"),
        (TEXT.replace("[defaults.kv]", '[defaults.kv]\ntransport = "cuda_ipc"'), ONE, "not every engine is on one"),
        (TEXT.replace('"cuda:0"', '"cuda:0"\nrunner = "simulated"'), ONE, "a simulated engine computes on the CPU"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_refused_with_a_remedy(place: Any, text: str, gpus: Gpus, words: str) -> None:
    with pytest.raises(FleetFileError, match=words):
        plan(text, place, gpus)


def test_nobody_looks_for_gpus_where_no_engine_wants_one(place: Any) -> None:
    place.model()

    def find() -> Gpus:
        raise AssertionError("it takes a second on a machine that has some")

    file = decode_fleet_file(TEXT.replace("cuda:0", "cpu:0"), source="fleet.toml", base=place.folder)
    check_fleet(file, find_gpus=find)


def test_the_gpus_of_a_joined_host_are_looked_for_there(place: Any) -> None:
    place.model()
    bus = '[listen]\nbus = "tcp://127.0.0.1:0"\n[models.tiny]'
    text = TEXT.replace("[models.tiny]", bus).replace('device = "cuda:0"', 'device = "cuda:0"\nhost = "b"')
    file = decode_fleet_file(text, source="fleet.toml", base=place.folder)
    check_fleet(file, find_gpus=lambda: NO_GPUS)
    with pytest.raises(FleetFileError, match="no GPU can be used here"):
        check_fleet(file, host="b", find_gpus=lambda: NO_GPUS)
