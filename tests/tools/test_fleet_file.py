"""The fleet file: what is wrong with it is said in one sentence, with its line and its remedy."""

import re
from pathlib import Path
from typing import Any

import pytest

from callboard.tools.errors import FleetFileError
from callboard.tools.fleet_check import check_fleet
from callboard.tools.fleet_file import decode_fleet_file, load_fleet_file
from callboard.tools.gpus import Gpus
from callboard.tools.toml_lines import TomlLines

GOOD = """\
name = "demo"
[models.tiny]
path = "model"
[[engine]]
name = "prefill"
roles = ["prefill"]
device = "cpu:0"
[[engine]]
name = "decode"
device = "cpu:1"
[[router]]
name = "main"
script = "disaggregate"
"""

# What to replace in the good file, by what; the line and the words of the sentence that must follow.
BAD = [
    ('device = "cpu:1"', 'devise = "cpu:1"', 10, 'unknown key "devise" in [[engine]]: did you mean "device"?'),
    ('name = "demo"', 'nmae = "demo"', 1, 'unknown key "nmae" in the top level: did you mean "name"?'),
    ('path = "model"', 'paths = "model"', 3, 'did you mean "path"?'),
    ('path = "model"', "path = 7", 3, "path must be a string, not 7"),
    ('path = "model"', "", 2, "[models.tiny] lacks path"),
    ('path = "model"', 'path = "nowhere"', 3, "there is no model at"),
    ('path = "model"', 'path = "model"\nquantize = "int4"', 4, "is not supported by this version"),
    ('path = "model"', 'path = "model"\ndtype = "fp32"', 4, 'dtype must be "auto" or "float32" or'),
    ("[models.tiny]", "[models]", 3, '[models.path] must be a table, not "model"'),
    ('name = "decode"', 'name = "prefill"', 9, 'the name "prefill" is taken: an actor on line 5 has it'),
    ('name = "decode"', 'name = "control"', 9, 'the name "control" is taken: Callboard names'),
    ('name = "decode"', 'name = "kv-cpu0"', 9, "the KV manager of cpu:0 has that name"),
    ('name = "decode"', 'name = "a/b"', 9, '"a/b" is no name'),
    ('name = "decode"', 'name = "decode"\nmodel = "tinny"', 10, 'there is no model "tinny": did you mean "tiny"?'),
    ('name = "decode"', 'name = "decode"\ntp = 2', 10, "tensor parallelism does not exist yet, write tp = 1"),
    ('name = "decode"', 'name = "decode"\ncount = 0', 10, "count must be at least 1, not 0"),
    ('name = "decode"', 'name = "decode"\nrestart = { polcy = "never" }', 10, 'did you mean "policy"?'),
    ('name = "decode"', 'name = "decode"\nrestart = { backoff = "soon" }', 10, '"soon" is no duration'),
    ('device = "cpu:1"', 'device = "cuda:0"', 10, "no GPU can be used here (there are none)"),
    ('device = "cpu:1"', 'device = "gpu"', 10, '"gpu" is no device'),
    (
        'device = "cpu:1"',
        'device = "cpu:0"\nblock_size = 32',
        11,
        "share one pool, and another one has block_size",
    ),
    ('roles = ["prefill"]', 'roles = ["prefil"]', 6, 'roles must be a list of "prefill" or "decode"'),
    ('roles = ["prefill"]', "roles = []", 6, "roles must name"),
    ('script = "disaggregate"', 'script = "disagregate"', 13, 'did you mean "disaggregate"?'),
    ('script = "disaggregate"', 'script = "mine.py"', 13, "there is no router script"),
    ('script = "disaggregate"', 'script = "leaves.py"', 13, "leaves.py:1: it fails while it is loaded: SystemExit"),
    ('name = "demo"', 'name = "demo"\n[listen]\napi_keys = "none.txt"', 3, "write one API key per line"),
    ('name = "demo"', 'name = "demo"\n[listen]\napi_keys = "broken.py"', 3, "a key is one word"),
    ('script = "disaggregate"', 'script = "broken.py"', 13, "broken.py:1"),
    ('script = "disaggregate"', 'script = "spins.py"', 13, "spins.py:1: its code outside of functions did not end"),
    ('script = "disaggregate"', 'script = "disaggregate"\nhang = "0s"', 14, "hang must be longer than nothing"),
    ('script = "disaggregate"', "", 11, "[[router]] lacks script"),
    ("[[router]]", "[router]", 11, "write [[router]] with double brackets"),
    ('name = "demo"', 'name = "demo"\nversion = 2', 2, "version must be 1, not 2"),
    ('name = "demo"', 'name = "my fleet"', 1, '"my fleet" is no name'),
    ("[[router]]", '[defaults.kv]\nsize = "1 gallon"\n[[router]]', 12, '"1 gallon" is no size'),
    ("[[router]]", '[defaults.kv]\nsize = "180%"\n[[router]]', 12, "more than there is"),
    ("[[router]]", '[defaults.kv]\nlease = "0s"\n[[router]]', 12, "lease must be longer than nothing"),
    ("[[router]]", '[defaults.kv]\ntransport = "inproc"\n[[router]]', 12, 'write transport = "auto"'),
    ("[[router]]", '[defaults.kv]\nwire = "int8"\n[[router]]', 12, '"auto" or "bfloat16" or "float8_e4m3", not "int8"'),
    ("[[router]]", '[defaults.kv]\nwire = "bfloat16"\ntransport = "shm"\n[[router]]', 12, "is of use over UCX alone"),
    ("[[router]]", '[defaults.kv]\nwire="bfloat16"\n[[engine]]\nname="s"\nrunner="simulated"\n[[router]]', 12, "lost"),
    ('name = "decode"', 'name = "decode"\nrunner="simulated"\ndtype="float16"', 11, "no numbers: remove dtype"),
    ("[[router]]", "[defaults.kv]\nverify = 1\n[[router]]", 12, "verify must be true or false, not 1"),
    ("[[router]]", '[listen]\nsilent = "0s"\n[[router]]', 12, "silent must be longer than nothing"),
    ("[[router]]", '[listen]\nsilent = "20ms"\n[[router]]', 12, "silent must be at least half a second"),
    ("[[router]]", "[listen]\nstall = nan\n[[router]]", 12, '"nan" is no duration'),
    ("[[router]]", '[listen]\nstall = "soon"\n[[router]]', 12, '"soon" is no duration'),
    ("[[router]]", '[listen]\nhttp = "localhost"\n[[router]]', 12, '"localhost" is no address'),
    ("[[router]]", "[listen]\nfrontends = 0\n[[router]]", 12, "frontends must be 1 to 64, not 0"),
    ("[[router]]", "[listen]\nfrontends = 1000000000\n[[router]]", 12, "frontends must be 1 to 64, not 1000000000"),
    ("[[router]]", "[listen]\nfrontends = true\n[[router]]", 12, "frontends must be a whole number, not true"),
    ("[[router]]", "[listen]\nfrontends = 2\nmicroserving = true\n[[router]]", 13, "needs frontends = 1"),
    ("[[router]]", '[listen]\nfrontends = 2\n[[engine]]\nname = "frontend-1"\n[[router]]', 14, '"frontend-1" is taken'),
    ("[[router]]", '[listen]\nbus = "tcp://1.2.3.4:5"\n[[router]]', 12, 'run "callboard keys new keys"'),
    ("[[router]]", '[listen]\nbus = "tcp://[fe80::1]:5"\n[[router]]', 12, "other machines can reach bus"),
    ("[[router]]", '[listen]\nbus = "tcp://0.0.0.0:5"\n[[router]]', 12, 'nobody can dial "0.0.0.0"'),
    ("[[router]]", '[listen]\nbus = "tcp://host.lan:5"\n[[router]]', 12, '"host.lan" is no IP address'),
    ("[[router]]", '[listen]\nbus = "tcp://127.0.0.1"\n[[router]]', 12, "is no address of a bus"),
    ("[[router]]", '[listen]\nbus = "tcp://127.0.0.1:70000"\n[[router]]', 12, "is no address of a bus"),
    ("[[router]]", '[listen]\nbus = "udp"\n[[router]]', 12, '"udp" is no address of a bus'),
    ("[[router]]", '[listen]\nkeys = "none"\n[[router]]', 12, 'make one with "callboard keys new'),
    ("[[router]]", '[listen]\nkey = "none"\n[[router]]', 12, 'did you mean "keys"?'),
    ("[[router]]", '[[actor]]\nname = "x"\n[[router]]', 11, "[[actor]] lacks class"),
    ("[[router]]", '[[actor]]\nname = "x"\nclass = "x"\n[[router]]', 13, 'write "module:Class"'),
    ("[[router]]", '[[actor]]\nname = "x"\nclass = "nowhere:X"\n[[router]]', 13, "there is no module nowhere"),
    ("[[router]]", "[[router]\n", 11, "not valid TOML"),
]


def check(text: str, place: Any) -> None:
    file = decode_fleet_file(text, source="fleet.toml", base=place.folder)
    check_fleet(file, find_gpus=lambda: Gpus(problem="there are none"))


@pytest.mark.parametrize(("old", "new", "line", "words"), BAD, ids=[case[1].strip() or case[0] for case in BAD])
def test_a_bad_file_is_refused_with_line_and_remedy(
    place: Any, monkeypatch: pytest.MonkeyPatch, old: str, new: str, line: int, words: str
) -> None:
    monkeypatch.setattr("callboard.tools.fleet_check.LOAD_S", 0.1)
    place.model()
    place.write("while True: pass\n", "spins.py")
    place.write("async def route(request fleet):\n", "broken.py")
    place.write("raise SystemExit(3)\n", "leaves.py")
    with pytest.raises(FleetFileError) as caught:
        check(GOOD.replace(old, new, 1), place)
    [problem] = caught.value.problems
    assert words in problem
    if "TOML" not in words:
        assert problem.startswith(f"fleet.toml:{line}: ")
    assert str(line) in problem
    assert "\n" not in problem


def test_the_good_file_is_good(place: Any) -> None:
    place.model()
    check(GOOD, place)


def test_all_problems_are_told_at_once_in_the_order_of_the_file(place: Any) -> None:
    with pytest.raises(FleetFileError) as caught:
        check('nme = "x"\n[lisen]\n[models.a]\npath = 3\n[[engine]]\nname = "e"\ntp = "two"\n', place)
    lines = [int(re.match(r"fleet\.toml:(\d+):", problem)[1]) for problem in caught.value.problems]  # type: ignore[index]
    assert lines == [1, 2, 4, 7]


def test_a_missing_file_names_the_command_that_writes_one(tmp_path: Path) -> None:
    with pytest.raises(FleetFileError, match="callboard init"):
        load_fleet_file(tmp_path / "none.toml")


def test_lines_are_found_in_nested_inline_and_dotted_tables() -> None:
    lines = TomlLines(
        'a = 1\n[b.c]\nd.e = 2\n[[f]]\ng = { h = 1, i = 2 }\n[[f]]\ntext = """\ng = 1\n"""\n[f.j]\nk = 3\n'
    )
    places = [("a",), ("b",), ("b", "c", "d", "e"), ("f", 0, "g", "i"), ("f", 1), ("f", 1, "text"), ("f", 1, "j", "k")]
    assert [lines.line_of(path) for path in places] == [1, 2, 3, 5, 6, 7, 11]
    assert lines.line_of(("f", 1, "unknown")) == 6
    assert lines.line_of(("nothing",)) is None
