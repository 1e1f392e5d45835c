"""What is wrong with a script is said with file, line and remedy, before a request meets it."""

import subprocess
import sys
from pathlib import Path

import pytest

from callboard.router import ScriptError
from callboard.router.script import load_script, shipped_scripts

GOOD = "async def route(request, fleet, *, ratio: float = 0.2, k: int = 1, deep: bool = False, name: str = 'x'):\n"
GOOD += "    yield ratio, k, deep, name\n"


@pytest.mark.parametrize(
    ("body", "line", "words"),
    [
        ("async def route(request, fleet)\n    yield 1\n", 1, ["syntax error", "expected ':'"]),
        ("x = 1\n", 1, ["defines no route", "async def route"]),
        ("\nasync def route(request, fleet):\n    return 1\n", 2, ["never yields", "yield every token"]),
        ("def route(request, fleet):\n    yield 1\n", 1, ["not asynchronous", "async def route"]),
        ("def route(request, fleet):\n    return 1\n", 1, ["not asynchronous"]),
        ("route = 3\n", 1, ["route is a int", "async def route"]),
        ("async def route(request):\n    yield 1\n", 1, ["first two parameters"]),
        ("async def route(*, request, fleet):\n    yield 1\n", 1, ["first two parameters"]),
        ("async def route(request, fleet, **more):\n    yield 1\n", 1, ["*more", "Name every option"]),
        ("import sys\nimport nothing_of_that_name\n", 2, ["while it is loaded", "nothing_of_that_name"]),
        ("x = 1\ny = 1 / 0\n", 2, ["ZeroDivisionError"]),
        ("async def route(request, fleet, *, ratio):\n    yield 1\n", 1, ["'ratio' has no value", "--set ratio="]),
        ("async def route(request, fleet, *, a: 'Nope' = 1):\n    yield 1\n", 1, ["annotation", "Nope"]),
    ],
)
def test_a_broken_script_is_refused_with_file_line_and_remedy(tmp_path, body, line, words):
    path = tmp_path / "mine.py"
    path.write_text(body)
    with pytest.raises(ScriptError) as refusal:
        load_script(str(path))
    text = str(refusal.value)
    assert text.startswith(f"{path}:{line}: ")
    assert refusal.value.line == line
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ration": 0.3}, ["no option 'ration'", "Did you mean 'ratio'?"]),
        ({"zzz": 0.3}, ["no option 'zzz'", "ratio, k, deep, name"]),
        ({"ratio": "much"}, ["'ratio' cannot be 'much'", "float"]),
        ({"k": 1.5}, ["'k' cannot be 1.5", "int"]),
        ({"deep": "perhaps"}, ["'deep' cannot be 'perhaps'", "bool"]),
        ({"name": 3}, ["'name' cannot be 3", "str"]),
    ],
)
def test_a_wrong_option_is_refused(tmp_path, options, words):
    path = tmp_path / "mine.py"
    path.write_text(GOOD)
    with pytest.raises(ScriptError) as refusal:
        load_script(str(path), options)
    for word in [str(path), *words]:
        assert word in str(refusal.value)


def test_options_are_taken_as_their_types(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(GOOD)
    from_strings = load_script(str(path), {"ratio": "0.3", "k": "2", "deep": "true", "name": "y"})
    from_toml = load_script(str(path), {"ratio": 1, "k": 2, "deep": True})
    assert from_strings.options == {"ratio": 0.3, "k": 2, "deep": True, "name": "y"}
    assert from_toml.options == {"ratio": 1.0, "k": 2, "deep": True, "name": "x"}


def test_an_option_without_annotation_has_the_type_of_its_default(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("async def route(request, fleet, *, k=2):\n    yield k\n")
    assert load_script(str(path), {"k": "3"}).options == {"k": 3}
    with pytest.raises(ScriptError, match="int"):
        load_script(str(path), {"k": "three"})


def test_a_script_that_is_not_there_is_named_with_what_is():
    with pytest.raises(ScriptError, match=r"Did you mean 'balanced'.*round_robin"):
        load_script("ballanced")


def test_every_shipped_script_loads():
    assert shipped_scripts() == [
        "adaptive",
        "balanced",
        "chain",
        "disaggregate",
        "least_loaded",
        "migrate",
        "prefix_aware",
        "round_robin",
    ]
    for name in shipped_scripts():
        script = load_script(name)
        assert script.name == name
        code = Path(script.path).read_text().split('"""', 2)[2]
        assert len([line for line in code.splitlines() if line.strip()]) <= 15


def test_a_script_loaded_again_starts_clean_and_hides_no_module(tmp_path):
    path = tmp_path / "json.py"
    path.write_text("seen = []\nasync def route(request, fleet):\n    seen.append(request)\n    yield len(seen)\n")
    before = dict(sys.modules)
    first, second = load_script(str(path)), load_script(str(path))
    assert first.route.func.__globals__["seen"] is not second.route.func.__globals__["seen"]
    assert first.version == second.version
    assert sys.modules == before


def test_importing_the_router_is_light():
    heavy = "torch transformers litestar uvicorn triton numpy"
    code = (
        f"import sys, callboard.router, callboard.router.actor; print([m for m in {heavy.split()} if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
