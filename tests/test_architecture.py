"""The layering of ARCHITECTURE.md, held: who may import whom, what ships, what stays light, what is deterministic."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("bus", "kernels", "kv", "actors", "router", "tools")
MAY_IMPORT = {
    "bus": {"bus"},
    "kernels": {"kernels"},
    "kv": {"kv", "bus", "kernels"},
    "actors": {"actors", "kv", "bus", "kernels"},
    "router": {"router", "bus"},
    "tools": {"tools", "router", "actors", "kv", "bus", "kernels"},
}
ROUTER_MAY_ALSO = {
    "callboard.actors.protocol",
    "callboard.actors.move_protocol",
    "callboard.actors.values",
    "callboard.actors.load_protocol",
    "callboard.actors.actor",
    "callboard.actors.directory",
    "callboard.actors.registration",
    "callboard.actors.route_protocol",
    "callboard.kv.layout",
    "callboard.kv.tokens",
}
"""A router talks to engines by their messages; it never imports them."""

LIGHT = {
    "callboard.bus": "",
    "callboard.router": "",
    "callboard.router.actor": "",
    "callboard.kv": "",
    "callboard.actors.protocol": "",
    "callboard.actors.directory": "",
    "callboard.actors.kv_manager": "",
    "callboard.actors.engine.engine": "",
    "callboard.actors.engine.simulated": "",
    "callboard.tools.cli": "",
    "callboard.actors.frontend.frontend": "litestar uvicorn",
}
"""Modules that control processes load, and which heavy ones each of them may bring."""
HEAVY = ("torch", "triton", "transformers", "litestar", "uvicorn", "ray", "ucxx", "ucp")

FORBIDDEN = re.compile(
    r"\b(time\.(time|monotonic|perf_counter|sleep)\w*\(|random\.\w+\(|uuid\.|threading\.|os\.getpid|secrets\.|"
    r"asyncio\.create_task|asyncio\.to_thread|datetime\.now)"
)
OUTSIDE = {
    "bus/clock.py",
    "bus/node.py",
    "bus/liveness.py",
    "bus/limited.py",
    "bus/watchdog.py",
    "bus/transports/zmq.py",
    "actors/process.py",
    "actors/supervisor.py",
    "actors/embedded_model.py",
    "kv/lanes/ucx.py",
}
"""Where the outside world is reached: everything else goes through its node."""


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_import_points_up_the_layers(folder: str) -> None:
    for path in modules(folder):
        for name in imported(path):
            if not name.startswith("callboard."):
                continue
            target = name.split(".")[1]
            if folder == "router" and target in ("actors", "kv"):
                allowed = any(name == ok or name.startswith(ok + ".") for ok in ROUTER_MAY_ALSO)
                assert allowed or name in ("callboard.actors", "callboard.kv"), f"{path}: {name}"
            else:
                assert target in MAY_IMPORT[folder], f"{path}: {name}"


def test_kernels_stays_a_namespace_folder() -> None:
    # A regular package of this name in the current directory would hide Hugging Face's `kernels`.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_folder_with_code_ships() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for folder in FOLDERS for path in modules(folder)}
    assert sorted("callboard." + str(f).replace("/", ".") for f in folders) == sorted(setuptools["packages"])
    assert {name: folder.replace("/", ".") for name, folder in setuptools["package-dir"].items()} == {
        name: name.removeprefix("callboard.") for name in setuptools["packages"]
    }


@pytest.mark.parametrize("module", LIGHT)
def test_control_processes_stay_light(module: str) -> None:
    heavy = [name for name in HEAVY if name not in LIGHT[module].split()]
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("folder", ["bus", "kv", "actors", "router"])
def test_actors_reach_the_outside_only_through_their_node(folder: str) -> None:
    for path in modules(folder):
        if str(path.relative_to(ROOT)) in OUTSIDE:
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not FORBIDDEN.search(line.split("#")[0]), f"{path}:{number}: {line.strip()}"


def test_files_stay_small() -> None:
    for folder in FOLDERS:
        for path in modules(folder):
            assert len(path.read_text().splitlines()) <= 400, path


def test_nothing_is_unpickled() -> None:
    for folder in FOLDERS:
        for path in modules(folder):
            assert not any(name.split(".")[0] in ("pickle", "dill", "cloudpickle") for name in imported(path)), path
