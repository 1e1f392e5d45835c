"""What a replay is told that cannot be: one sentence, and exit code 2."""

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from replayed import CONFIG, FLEET, SCRIPT, load, record

from callboard.tools.cli import main
from callboard.tools.errors import CliError
from callboard.tools.replay.report import Report
from callboard.tools.replay.shape import ShapeOf
from callboard.tools.replay.simulated import check_memory
from callboard.tools.replay.tape import Tape, read_tape


@pytest.fixture(autouse=True)
def nobody_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))


def replay(path: Path, *words: str, capsys: pytest.CaptureFixture[str]) -> Report:
    assert main(["replay", str(path), "--json", *words]) == 0
    return msgspec.json.decode(capsys.readouterr().out, type=Report)


def tape(path: Path) -> Tape:
    return read_tape(str(path), is_partial=False, limit=None, show=lambda text: None)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("recordings")
    record(folder / "a.rec", load(5))
    record(folder / "empty.rec", [])
    record(folder / "none_kept.rec", load(2), bodies="none")
    made = {path.name: path.read_bytes() for path in folder.iterdir()}
    return {**made, "cut.rec": made["a.rec"][:-100], "foreign": b"PK\x03\x04" + bytes(200)}


@pytest.fixture(scope="module")
def recorded(recordings: dict[str, bytes]) -> bytes:
    return recordings["a.rec"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["none.rec"], "there is no recording none.rec"),
        (["foreign"], 'foreign is no recording: "callboard trace record" writes them'),
        (["cut.rec"], "are whole: --partial goes on with what is whole"),
        (["empty.rec"], "empty.rec has no request in it: there is nothing to replay"),
        (["none_kept.rec"], "was recorded without prompts"),
        (["a.rec", "--router", "lest_loaded"], "there is no such script. Did you mean 'least_loaded'?"),
        (
            ["a.rec", "--router", "balanced", "--set", "ration=0.3"],
            "route has no option 'ration'. Did you mean 'ratio'?",
        ),
        (["a.rec", "--router", "balanced", "--set", "ratio"], '--set "ratio" sets nothing: write --set NAME=VALUE'),
        (["a.rec", "--speed", "0"], "--speed 0 is no speed"),
        (["a.rec", "--speed", "nan"], "--speed nan is no speed"),
        (["a.rec", "--limit", "0"], "--limit 0 would replay nothing"),
        (["a.rec", "--fleet", "nowhere"], 'no fleet "nowhere" is running'),
        (["none.rec", "--fleet", "nowhere"], "there is no recording none.rec"),
        (["a.rec", "--fleet", "x", "--simulate"], "give one of them"),
        (["a.rec", "--simulate", "none.toml"], "there is no fleet file none.toml"),
        (["a.rec", "--simulate", "other.toml"], 'the simulated fleet serves other, and the recording asks for "tiny"'),
    ],
)
def test_bad_input_gets_one_sentence_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    recordings: dict[str, bytes],
    words: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, data in recordings.items():
        Path(name).write_bytes(data)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes(msgspec.json.encode(CONFIG))
    Path("other.toml").write_text(FLEET.format(count=1).replace("tiny", "other"))
    capsys.readouterr()
    assert main(["replay", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert sentence in captured.err
    assert captured.err.count("\n") == 1


def test_a_recording_may_stand_behind_the_word_simulate(
    tmp_path: Path, recorded: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.rec"
    path.write_bytes(recorded)
    assert main(["replay", "--simulate", str(path)]) == 0
    assert "in a simulation of the fleet" in capsys.readouterr().out
    for words in (["replay"], ["replay", "--simulate"]):
        assert main(words) == 2
        assert capsys.readouterr().err == (
            "callboard: name the recording to replay, as in: callboard replay today.rec\n"
        )


def test_a_script_that_is_not_here_any_more_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT)
    record(tmp_path / "a.rec", load(5), script=str(script))
    script.write_text(SCRIPT + "# another version\n")
    report = replay(tmp_path / "a.rec", capsys=capsys)
    assert any("mine.py has changed since it was recorded" in note for note in report.notes)
    script.unlink()
    assert main(["replay", str(tmp_path / "a.rec")]) == 2
    assert "is not here: give one with --router" in capsys.readouterr().err


def test_of_a_damaged_recording_the_rest_is_replayed(
    tmp_path: Path, recorded: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.rec"
    path.write_bytes(recorded[:-30])
    report = replay(path, "--partial", capsys=capsys)
    assert len(report.requests) == 5
    assert any("is damaged" in note for note in report.notes)


def test_the_table_says_what_differs(tmp_path: Path, recorded: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.rec"
    path.write_bytes(recorded)
    assert main(["replay", str(path), "--router", "least_loaded"]) == 0
    shown = capsys.readouterr().out
    assert "Replayed: in a simulation of the fleet" in shown
    assert "Decisions: 0 of 5 the same" in shown
    assert "prep_recv d0 [0," in shown
    assert "→ start_generate" in shown


def test_pools_larger_than_memory_are_refused(tmp_path: Path) -> None:
    record(tmp_path / "a.rec", load(2))
    shape = tape(tmp_path / "a.rec").shape.shape()
    check_memory(shape)
    huge = replace(shape, managers=tuple(replace(each, num_blocks=10**12) for each in shape.managers))
    with pytest.raises(CliError, match=r"blocks take .* to simulate, and .* are free"):
        check_memory(huge)


def test_a_shape_without_engines_is_refused() -> None:
    with pytest.raises(CliError, match="knows no engines"):
        ShapeOf().shape()
