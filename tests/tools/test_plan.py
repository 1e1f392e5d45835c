"""The plan: which processes a fleet file becomes."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from callboard.kv.layout import KvLayout
from callboard.tools.endpoints import Endpoints
from callboard.tools.errors import FleetFileError, StartFailed
from callboard.tools.fleet_check import check_fleet
from callboard.tools.fleet_file import decode_fleet_file
from callboard.tools.launcher import check_memory
from callboard.tools.plan import Machine, Plan, Planner
from callboard.tools.plan_control import FRONTEND_BYTES

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
"""


def make(
    text: str,
    place: Any,
    run_dir: Path = Path("/run/x"),
    cores: tuple[int, ...] = (2, 5),
    **options: Any,
) -> Plan:
    file = decode_fleet_file(text, source="fleet.toml", base=place.folder)
    check_fleet(file)
    models = {name: place.folder / model.path for name, model in file.fleet.models.items()}
    machine = Machine(cores, 4 * GIB)
    return Planner(file, run_dir=run_dir, models=models, machine=machine, port=8123, **options).plan()


def test_a_fleet_is_a_control_node_a_manager_per_device_and_a_node_per_engine(place: Any) -> None:
    place.model()
    plan = make(TWO, place)
    assert [[node.name for node in stage] for stage in plan.stages] == [
        ["control"],
        ["kv-cpu0", "kv-cpu1"],
        ["prefill", "decode"],
    ]
    assert [actor.name for actor in plan.nodes[0].actors] == ["directory", "main", "frontend"]
    assert plan.url == "http://127.0.0.1:8123"
    assert plan.models == ("tiny",)
    assert plan.nodes[0].actors[1].config["script"].endswith("disaggregate.py")
    assert all(node.endpoint == f"ipc:///run/x/{node.name}.sock" for node in plan.nodes)


def test_an_engine_is_pinned_to_the_nth_allowed_core_with_one_thread(place: Any) -> None:
    place.model()
    nodes = {node.name: node for node in make(TWO, place).nodes}
    assert (nodes["prefill"].cores, nodes["decode"].cores) == ((2,), (5,))
    assert nodes["decode"].num_threads == nodes["decode"].actors[0].config["num_threads"] == 1
    assert nodes["kv-cpu0"].cores == ()
    assert not make(TWO, place).warnings


def test_too_few_cores_are_shared_with_a_warning(place: Any) -> None:
    place.model()
    plan = make(TWO, place, cores=(3,))
    assert {node.cores for node in plan.nodes if node.kind == "engine"} == {(3,)}
    assert plan.warnings == ("cpu:1 shares core 3: there are only 1 cores here",)


def test_a_plain_cpu_device_takes_all_cores(place: Any) -> None:
    place.model()
    [engine] = [node for node in make(TWO.replace('"cpu:0"', '"cpu"'), place).nodes if node.name == "prefill"]
    assert (engine.cores, engine.num_threads) == ((2, 5), 2)


def test_engines_of_one_device_share_a_pool_of_whole_blocks(place: Any) -> None:
    place.model()
    plan = make(TWO.replace("cpu:1", "cpu:0").replace('roles = ["decode"]', "count = 2"), place)
    [manager] = [node for node in plan.nodes if node.kind == "kv_manager"]
    config = manager.actors[0].config
    layout = msgspec.convert(config["layout"], KvLayout)
    assert layout == KvLayout(2, 2, 16, 16, "float32")
    assert config["num_blocks"] == (1 << 20) // layout.block_bytes
    assert manager.pool_bytes == config["num_blocks"] * layout.block_bytes == plan.memory.pools
    engines = [node for node in plan.nodes if node.kind == "engine"]
    assert [node.name for node in engines] == ["prefill", "decode-0", "decode-1"]
    assert {node.actors[0].config["manager"][1] for node in engines} == {"ipc:///run/x/kv-cpu0.sock"}


def test_engines_of_one_model_may_keep_their_kv_differently(place: Any) -> None:
    place.model()
    text = TWO.replace('name = "decode"', 'name = "decode"\ndtype = "bfloat16"\nblock_size = 8')
    plan = make(text.replace("[[engine]]", 'wire = "float8_e4m3"\n[[engine]]', 1), place)
    managers = {node.name: node.actors[0].config for node in plan.nodes if node.kind == "kv_manager"}
    layouts = {name: msgspec.convert(config["layout"], KvLayout) for name, config in managers.items()}
    kinds = {name: (layout.dtype, layout.block_size) for name, layout in layouts.items()}
    assert kinds == {"kv-cpu0": ("float32", 16), "kv-cpu1": ("bfloat16", 8)}
    assert {config["wire_dtype"] for config in managers.values()} == {"float8_e4m3"}
    engines = [node.actors[0].config for node in plan.nodes if node.kind == "engine"]
    assert [(config["dtype"], config["block_size"]) for config in engines] == [("float32", 16), ("bfloat16", 8)]
    with pytest.raises(FleetFileError, match=r'"decode" and "prefill" share the pool of cpu:0.*give one another'):
        make(text.replace("cpu:1", "cpu:0").replace("block_size = 8", ""), place)


def test_models_of_different_layouts_cannot_share_a_device(place: Any) -> None:
    place.model()
    place.model("other", num_hidden_layers=3)
    text = TWO.replace("[defaults.kv]", '[models.other]\npath = "other"\n[defaults.kv]').replace("cpu:1", "cpu:0")
    text = text.replace('name = "prefill"', 'name = "prefill"\nmodel = "tiny"')
    text = text.replace('name = "decode"', 'name = "decode"\nmodel = "other"')
    with pytest.raises(FleetFileError, match=r'"decode" and "prefill" share the pool of cpu:0.*give one another'):
        make(text, place)


def test_models_of_one_layout_cannot_share_a_device_either(place: Any) -> None:
    place.model()
    place.model("twin")
    text = TWO.replace('device = "cpu:1"', 'device = "cpu:0"\nmodel = "twin"')
    text = text.replace('name = "prefill"', 'name = "prefill"\nmodel = "tiny"')
    text = text.replace("[defaults.kv]", '[models.twin]\npath = "twin"\n[defaults.kv]')
    with pytest.raises(FleetFileError, match=r'"decode" and "prefill" share the pool of cpu:0, but not one model'):
        make(text, place)
    apart = make(text.replace('device = "cpu:0"\nmodel = "twin"', 'device = "cpu:1"\nmodel = "twin"'), place)
    told = [actor.config["fingerprint"] for node in apart.nodes[1:] for actor in node.actors]
    assert told[:2] == told[2:]
    assert told[0] != told[1]


def test_a_pool_smaller_than_the_context_bounds_requests_with_a_warning(place: Any) -> None:
    place.model()
    plan = make(TWO.replace("1MiB", "64KiB"), place)
    assert plan.warnings[0] == "the pool of cpu:0 holds 128 tokens, so that is the longest request"
    [engine, _] = [node for node in plan.nodes if node.kind == "engine"]
    frontend = plan.nodes[0].actors[-1]
    assert engine.actors[0].config["max_model_len"] == frontend.config["models"]["tiny"]["max_model_len"] == 128
    assert frontend.config["models"]["tiny"]["roles"] == ["decode", "prefill"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("1MiB", "1KiB", "fleet.toml:6: a pool of 1.0 KiB does not hold two blocks"),
        (
            "max_model_len = 256",
            "max_model_len = 9999",
            "fleet.toml:4: max_model_len = 9999, but the model was",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused(place: Any, old: str, new: str, words: str) -> None:
    place.model()
    with pytest.raises(FleetFileError, match=words):
        make(TWO.replace(old, new), place)


def test_a_path_too_long_for_a_socket_is_refused(place: Any) -> None:
    place.model()
    with pytest.raises(FleetFileError, match="too long for a unix socket"):
        make(TWO, place, run_dir=Path("/run") / ("x" * 90))


def test_memory_that_is_short_is_said_before_anything_starts(place: Any) -> None:
    place.model()
    plan = make(TWO, place)
    assert plan.memory.weights == 2 * (1 << 20)
    check_memory(plan, plan.memory.total)
    with pytest.raises(StartFailed, match=r"the fleet needs about .* and 0 B are free: lower size in \[defaults.kv\]"):
        check_memory(plan, 0)


def test_a_share_of_the_memory_is_a_size(place: Any) -> None:
    place.model()
    plan = make(TWO.replace("1MiB", "50%"), place)
    assert abs(plan.memory.pools - 2 * 2 * GIB) < 1 << 20


def test_everybody_is_told_how_long_silence_and_stalls_may_last(place: Any) -> None:
    place.model()
    plan = make(TWO + '[listen]\nsilent = "2s"\nstall = "7s"\n', place)
    assert {node.silent_s for node in plan.nodes} == {2.0}
    actors = {actor.name: actor for node in plan.nodes for actor in node.actors}
    assert {actors[name].config["stall_s"] for name in ("prefill", "decode", "frontend")} == {7.0}


def test_user_actors_alone_make_a_fleet_without_http(place: Any) -> None:
    plan = make('[[actor]]\nname = "ping"\nclass = "my_actors:Ping"\n', place)
    assert [node.name for node in plan.nodes] == ["control", "ping"]
    assert plan.url is None
    assert plan.nodes[1].python_path == str(place.folder)
    assert not plan.nodes[1].dies_with_launcher


ROUTER = '[[router]]\nname = "{}"\nscript = "disaggregate"\n'


def test_one_router_is_beside_the_frontend_and_of_several_each_has_a_process(place: Any) -> None:
    place.model()
    one = make(TWO + ROUTER.format("only") + 'deadline = "7s"\npatience = "3s"\n', place)
    assert [actor.name for actor in one.nodes[0].actors] == ["directory", "only", "frontend"]
    frontend = one.nodes[0].actors[-1].config
    assert (frontend["router"][2], frontend["request_timeout_s"], frontend["patience_s"]) == ("only", 8.0, 3.0)
    two = make(TWO + ROUTER.format("main") + 'count = 2\nrestart = { backoff = "90ms", max = 9 }\n', place)
    nodes = {node.name: node for node in two.nodes}
    assert [actor.name for actor in nodes["control"].actors] == ["directory", "frontend"]
    for name in ("main-0", "main-1"):
        node, [actor] = nodes[name], nodes[name].actors
        assert (node.kind, node.dies_with_launcher, node.is_essential) == ("router", True, False)
        assert (node.restart.is_enabled, node.restart.backoff_s, node.restart.max_restarts) == (True, 0.09, 9)
        assert (actor.name, actor.config["name"]) == (name, name)
        assert [node in stage for stage in two.stages] == [False, True, False]
    frontend = nodes["control"].actors[-1].config
    assert (frontend.get("router"), frontend["routers"]) == (None, [])


@pytest.mark.parametrize(
    ("listen", "router", "seconds"),
    [("", "", 2.0), ("", 'hang = "500ms"', 0.5), ('silent = "1s"', "", 0.4), ("", 'hang = "1h"', 2.0)],
)
def test_a_script_is_interrupted_before_its_process_is_cut_off(
    place: Any, listen: str, router: str, seconds: float
) -> None:
    place.model()
    control = make(f"{TWO}[listen]\n{listen}\n{ROUTER.format('only')}{router}", place).nodes[0]
    [config] = [actor.config for actor in control.actors if actor.name == "only"]
    assert config["hung_s"] == seconds


def test_the_frontend_does_not_ask_inner_routers(place: Any) -> None:
    place.model()
    text = TWO + ROUTER.format("outer") + ROUTER.format("inner") + "inner = true\n"
    plan = make(text, place)
    assert [node.name for node in plan.nodes if node.kind == "router"] == ["outer", "inner"]
    assert plan.nodes[0].actors[-1].config["routers"] == ["outer"]
    with pytest.raises(FleetFileError, match="every router is inner"):
        make(TWO + ROUTER.format("inner") + "inner = true\n", place)


def test_engines_are_asked_past_the_routers_only_where_the_file_says_so(place: Any) -> None:
    place.model()
    assert make(TWO, place).nodes[0].actors[-1].config["microserving"] is False
    text = TWO.replace("[models.tiny]", "[listen]\nmicroserving = true\n[models.tiny]")
    assert make(text, place).nodes[0].actors[-1].config["microserving"] is True


def test_on_tcp_everybody_is_told_the_same_endpoints_and_handed_the_keys(place: Any) -> None:
    place.model()
    bus = "tcp://127.0.0.1:0"
    text = TWO.replace("[models.tiny]", f'[listen]\nbus = "{bus}"\n[models.tiny]')
    with Endpoints(bus, Path("/run/x")) as endpoints:
        plan = make(text, place, endpoints=endpoints, keys=bytes(32))
        nodes = {node.name: node for node in plan.nodes}
        assert all(node.endpoint == endpoints.of(name) for name, node in nodes.items())
    assert len({node.endpoint for node in plan.nodes}) == 5
    assert {node.keys for node in plan.nodes} == {bytes(32)}
    assert plan.directory.endpoint == nodes["control"].endpoint
    assert {node.directory for node in plan.nodes} == {plan.directory}
    assert nodes["decode"].actors[0].config["manager"][1] == nodes["kv-cpu1"].endpoint
    assert nodes["control"].actors[-1].config["router"][1] == nodes["control"].endpoint
    assert plan.warnings == ()


def test_a_file_of_api_keys_that_others_can_read_is_warned_of(place: Any) -> None:
    place.model()
    path = place.write("sk-one\n", "api-keys.txt")
    text = TWO.replace("[models.tiny]", '[listen]\napi_keys = "api-keys.txt"\n[models.tiny]')
    path.chmod(0o644)
    assert make(text, place).warnings == (
        f"the API keys are no secret, because {path} is open to other users (mode 0644): run chmod 600 {path}",
    )
    path.chmod(0o600)
    assert make(text, place).warnings == ()


def test_of_several_frontends_each_has_a_process_and_all_have_one_socket(place: Any) -> None:
    place.model()
    text = TWO.replace("[models.tiny]", "[listen]\nfrontends = 3\n[models.tiny]") + ROUTER.format("main")
    with Endpoints("ipc", Path("/run/x")) as endpoints:
        fd = endpoints.listen("127.0.0.1", 0)
        plan = make(text, place, endpoints=endpoints)
        names = ["frontend-0", "frontend-1", "frontend-2"]
        assert [[node.name for node in stage] for stage in plan.stages] == [
            ["control"],
            ["kv-cpu0", "kv-cpu1", *names],
            ["prefill", "decode"],
        ]
        assert [actor.name for actor in plan.nodes[0].actors] == ["directory", "main"]
        for node in plan.nodes[3:6]:
            [actor] = node.actors
            assert (node.kind, node.dies_with_launcher, node.is_essential) == ("frontend", True, False)
            assert (node.inherits, node.restart.backoff_s, node.restart.max_restarts) == ((fd,), 0.2, 5)
            assert actor.config["shared"] == {"fd": fd, "names": names, "folder": "/run/x"}
            assert (actor.name, actor.config["name"]) == (node.name, node.name)
            assert actor.config["router"] == ["control", "ipc:///run/x/control.sock", "main"]
            assert actor.config["models"]["tiny"]["roles"] == ["decode", "prefill"]
        assert {node.inherits for node in plan.nodes if node.kind != "frontend"} == {()}
        assert plan.memory.processes - make(TWO, place).memory.processes == 3 * FRONTEND_BYTES
        assert plan.url == "http://127.0.0.1:8123"


def test_a_joined_host_has_no_frontends(place: Any) -> None:
    place.model()
    text = TWO.replace("[models.tiny]", '[listen]\nbus = "tcp://127.0.0.1:0"\nfrontends = 2\n[models.tiny]')
    text = text.replace('device = "cpu:1"', 'device = "cpu:1"\nhost = "b"')
    with Endpoints("tcp://127.0.0.1:0", place.folder) as endpoints:
        plan = make(text, place, endpoints=endpoints, host="b", keys=bytes(32))
    assert [node.name for node in plan.nodes] == ["kv-b-cpu1", "decode"]
