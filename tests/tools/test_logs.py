"""Logs: one event a line with its request, quiet when all is well, merged by time, kept when a fleet fails."""

import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from my_actors import Die
from served_fleet import ServedFleet
from waiting import PATIENCE_S

from callboard.actors import logs as node_logs
from callboard.actors.kept_logs import MOST_FILE_BYTES, MOST_FLEETS, keep_logs
from callboard.actors.logs import FileHandler, Line, LineFormatter, WhoseFilter
from callboard.bus import Ask, Message, Node
from callboard.bus.transports.inproc import InprocHub
from callboard.tools.kept_logs import find_kept, kept_at
from callboard.tools.log_lines import LogFile, Printer, chooser, last_lines, merged

Eventually = Callable[..., None]
FAILING = """\
async def route(request, fleet):
    raise RuntimeError("the script is broken")
    yield
"""


def lines_of(place: Any, *words: str) -> list[dict[str, Any]]:
    """What ``logs --json`` prints."""
    done = place.callboard("logs", "--json", *words)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


# ---- lines -------------------------------------------------------------------------------------------------------


@pytest.fixture
def log(tmp_path: Path) -> Iterator[logging.Logger]:
    """A logger that writes lines into ``a.log``."""
    logger = logging.getLogger("callboard.test_logs")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    path = tmp_path / "a.log"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    handler = FileHandler(fd, path)
    handler.setFormatter(LineFormatter("a"))
    handler.addFilter(WhoseFilter())
    logger.addHandler(handler)
    yield logger
    logger.removeHandler(handler)
    os.close(fd)


def written(tmp_path: Path) -> list[Line]:
    return [msgspec.json.decode(line, type=Line) for line in (tmp_path / "a.log").read_bytes().splitlines()]


def test_an_event_is_one_line_whatever_is_in_it(log: logging.Logger, tmp_path: Path) -> None:
    log.info("two\nlines \x1b[31mred \udcff %s", "{}")
    try:
        raise ValueError("bad\nnews")
    except ValueError:
        log.exception("it broke")
    misfit = log.makeRecord(log.name, logging.WARNING, "x.py", 1, "%d is no number", ("x",), None)
    next(each for each in log.handlers if isinstance(each, FileHandler)).handle(misfit)
    log.critical("the end")
    first, second, third, fourth = written(tmp_path)
    assert (first.level, first.node, first.logger) == ("info", "a", "callboard.test_logs")
    assert first.event == "two\nlines \x1b[31mred ? {}"
    assert first.time.endswith("Z")
    assert second.event == "it broke"
    assert second.error.startswith("Traceback (most recent call last):\n")
    assert second.error.endswith("ValueError: bad\nnews")
    assert "%d is no number" in third.event
    assert (fourth.level, fourth.error) == ("error", "")


def test_a_long_event_is_cut_in_its_middle(log: logging.Logger, tmp_path: Path) -> None:
    log.info("a" * 100_000 + "z")
    [line] = written(tmp_path)
    assert len(line.event) < 10_000
    assert line.event[0] + line.event[-1] == "az"


class Answered(Message, frozen=True):
    pass


class Complain(Ask[Answered], frozen=True):
    request_id: str


class Plaintiff:
    def on_complain(self, message: Complain) -> Answered:
        logging.getLogger("callboard.test_logs").warning("something is wrong")
        return Answered()


async def test_a_line_has_the_request_and_the_actor_of_the_call_that_it_was_written_in(
    log: logging.Logger, tmp_path: Path
) -> None:
    hub = InprocHub()
    async with Node("a", endpoint="inproc://a", transport=hub.transport()) as node:
        ref = node.add("plaintiff", Plaintiff())
        await ref.ask(Complain("my-request"))
    log.warning("outside")
    log.warning("named", extra={"request_id": "other"})
    inside, outside, named = written(tmp_path)
    assert (inside.actor, inside.request_id) == ("plaintiff", "my-request")
    assert (outside.actor, outside.request_id) == ("", "")
    assert (named.actor, named.request_id) == ("", "other")


def test_a_log_that_has_grown_begins_anew_and_its_last_part_stays(
    log: logging.Logger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_logs, "MOST_BYTES", 100_000)
    file = LogFile(tmp_path / "a.log")
    seen = []
    for number in range(1000):
        log.info("%d %s", number, "x" * 1000)
        if number % 50 == 0:  # A follower looks often enough.
            seen += [line.line.event.split()[0] for line in file.lines(is_final=False) if line.line is not None]
    file.close()
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) == 2
    assert sum(sizes) < 400_000
    assert len(seen) == len(set(seen)) > 500
    latest = [line.line.event.split()[0] for line in LogFile(tmp_path / "a.log").lines() if line.line is not None]
    assert latest == [str(number) for number in range(1000 - len(latest), 1000)]


def test_a_log_that_cannot_be_kept_begins_anew_all_the_same(
    log: logging.Logger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_logs, "MOST_BYTES", 100_000)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    (tmp_path / "a.log.1").symlink_to(elsewhere)
    for number in range(500):
        log.info("%d %s", number, "x" * 1000)
    assert (tmp_path / "a.log").stat().st_size < 200_000
    assert elsewhere.read_text() == "mine"
    (tmp_path / "a.log.1").unlink()
    for number in range(500):
        log.info("%d %s", number, "x" * 1000)
    assert (tmp_path / "a.log.1").stat().st_mode & 0o777 == 0o600


def test_a_request_id_as_long_as_a_message_is_cut(log: logging.Logger, tmp_path: Path) -> None:
    log.info("x", extra={"request_id": "r" * 1_000_000, "actor": "a" * 1_000_000})
    assert (tmp_path / "a.log").stat().st_size < 1000


# ---- reading -----------------------------------------------------------------------------------------------------


def line(second: int, event: str, **more: str) -> bytes:
    stamp = f"2026-11-22T01:00:{second:02d}.000000Z"
    return msgspec.json.encode({"time": stamp, "level": "info", "node": "x", "event": event, **more}) + b"\n"


def events(folder: Path, **wanted: Any) -> list[str]:
    is_wanted = chooser(**{"level": None, "request_id": None, **wanted})
    files = [LogFile(path) for path in sorted(folder.glob("*.log"))]
    return [each.line.event if each.line else each.text for each in merged(files) if is_wanted(each)]


def test_logs_are_merged_by_time_and_other_words_stay_behind_the_line_before_them(tmp_path: Path) -> None:
    crash = b"Fatal Python error: Segmentation fault\n\n{not json\n"
    (tmp_path / "a.log").write_bytes(line(1, "a1") + crash + line(5, "a5"))
    (tmp_path / "b.log").write_bytes(b"\xff\xfe before all\n" + line(2, "b2") + line(4, "b4") + b"no end of line")
    assert events(tmp_path) == [
        *("\N{REPLACEMENT CHARACTER}" * 2 + " before all", "a1", "Fatal Python error: Segmentation fault", ""),
        *("{not json", "b2", "b4", "no end of line", "a5"),
    ]


def test_lines_are_chosen_by_level_and_by_request_with_its_later_sequences(tmp_path: Path) -> None:
    text = line(1, "one", request_id="r") + line(2, "two", request_id="r.1", level="error") + b"crash\n"
    text += line(3, "other", request_id="r2", level="warning") + line(4, "odd", level="notice")
    (tmp_path / "a.log").write_bytes(text)
    assert events(tmp_path, request_id="r") == ["one", "two"]
    assert events(tmp_path, level="warning") == ["two", "crash", "other"]
    assert events(tmp_path, level="error", request_id="r") == ["two"]


def test_what_is_shown_moves_no_cursor(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_bytes(line(1, "red \x1b[31m\r\n", error="Traceback\n  \x07 bell") + b"\x1b[2J gone\n")
    shown = last_lines(tmp_path / "a.log", 10)
    assert [text.partition("info ")[2] or text for text in shown] == [
        *("   : red \\x1b[31m\\r\\n", "    Traceback", "      \\x07 bell", "\\x1b[2J gone"),
    ]


def test_colors_are_for_terminals_alone(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_bytes(line(1, "event", level="error", request_id="r"))
    [found] = LogFile(tmp_path / "a.log").lines()
    assert "\x1b[31merror" in Printer(width=3, has_color=True)(found)
    assert "\x1b" not in Printer(width=3, has_color=False)(found)


# ---- fleets ------------------------------------------------------------------------------------------------------


def test_requests_that_are_served_write_no_line_and_a_restart_is_in_one_log_by_time(
    place: Any, eventually: Eventually
) -> None:
    fleet = ServedFleet(place)
    before = place.callboard("logs").stdout
    for number in range(5):
        assert fleet.complete("x" * 50, request_id=f"quiet-{number}")[0] == 200
    fleet.get("/metrics")
    fleet.complete("x" * 5000)  # Too long: its client is told, and nobody else needs to know.
    assert place.callboard("logs").stdout == before
    assert {each["event"] for each in lines_of(place, "control")} == {"ready"}
    assert all(each["level"] == "info" for each in lines_of(place))
    of_one = place.callboard("logs", "--request", "quiet-1")
    assert (of_one.returncode, of_one.stdout) == (0, "")
    assert of_one.stderr.startswith("callboard: nobody has logged a line of request quiet-1; requests that are served")

    os.kill(fleet.rows()["decode"]["pid"], signal.SIGKILL)
    eventually(lambda: fleet.rows().get("decode", {}).get("num_restarts") == 1)
    eventually(lambda: sum(each["event"] == "ready" for each in lines_of(place, "decode")) == 2)
    found = lines_of(place)
    assert [each["time"] for each in found] == sorted(each["time"] for each in found)
    assert {each["node"] for each in found} == {"control", "decode", "kv-cpu0", "kv-cpu1", "launcher", "prefill"}
    [restart] = lines_of(place, "launcher", "--level", "warning")
    assert restart["event"] == "decode is restarting: it was killed by SIGKILL"
    assert [each["node"] for each in lines_of(place, "--tail", "1")] == [found[-1]["node"]]
    assert place.callboard("logs", "--list").stdout.split() == sorted({each["node"] for each in found})
    text = place.callboard("logs", "launcher", "--level", "warning").stdout
    assert text.endswith("warning launcher: decode is restarting: it was killed by SIGKILL\n")


def test_a_request_that_fails_is_found_by_its_id_and_neither_prompts_nor_keys_get_into_any_log(place: Any) -> None:
    (place.folder / "keys.txt").write_text("sk-topsecret\n")
    (place.folder / "keys.txt").chmod(0o600)
    place.write(FAILING, "failing.py")
    more = '[[router]]\nname = "main"\nscript = "failing.py"\n[log]\nlevel = "debug"\n'
    fleet = ServedFleet(place, listen='api_keys = "keys.txt"', more=more)
    assert fleet.complete("a secret prompt", request_id="lost-1", key="sk-topsecret")[0] == 500
    fleet.complete("x", request_id="lost-2", key="sk-topsecret")
    assert fleet.complete("marzipan", key="sk-another")[0] == 401
    [found] = lines_of(place, "--request", "lost-1", "--level", "error")
    assert (found["node"], found["level"], found["actor"], found["request_id"]) == (
        "control",
        "error",
        "main",
        "lost-1",
    )
    assert "RuntimeError: the script is broken" in found["error"]
    assert "failing.py" in found["event"]
    text = place.callboard("logs", "--request", "lost-1").stdout
    assert "[lost-1]" in text
    assert "\n    RuntimeError: the script is broken" in text
    written = b"".join(path.read_bytes() for path in (place.runtime / "callboard/test/logs").iterdir())
    assert b"the script is broken" in written
    assert not any(word in written for word in (b"secret", b"marzipan", b"sk-another"))


def test_the_level_of_the_fleet_file_is_that_of_the_logs(place: Any) -> None:
    fleet = Path(place.actor_fleet())
    place.write(fleet.read_text() + '[log]\nlevel = "error"\n')
    assert place.callboard("up", str(fleet), "--detach").returncode == 0
    assert lines_of(place) == []
    done = place.callboard("check", str(place.write('[log]\nlevel = "loud"\n', "bad.toml")))
    assert done.returncode == 2
    assert 'level must be "debug" or "info" or "warning" or "error", not "loud"' in done.stderr


def test_logs_are_followed_until_the_fleet_ends(place: Any) -> None:
    fleet = place.actor_fleet()
    place.callboard("up", fleet, "--detach")
    follow = place.start("logs", "-f")
    assert follow.stdout is not None
    assert " ready" in follow.stdout.readline()  # Of a process, or of the launcher: by time.
    place.ask(Die())
    text = ""
    while "RuntimeError: a bug" not in text:
        text += follow.stdout.readline()
    place.callboard("down")
    rest, errors = follow.communicate(timeout=PATIENCE_S)
    assert "stopping" in rest
    assert (follow.returncode, errors) == (0, "fleet test has ended\n")


def test_the_logs_of_a_fleet_that_failed_are_kept_and_the_sentence_says_where(place: Any) -> None:
    done = place.callboard("up", place.actor_fleet("Refusing"))
    assert done.returncode == 1
    assert "its logs are kept: callboard logs --failed --fleet test" in done.stderr
    assert len([text for text in done.stderr.splitlines() if "kept" in text]) == 1
    assert place.is_empty()
    kept = place.callboard("logs", "--failed")
    assert "OSError: the moon is not in the right phase" in kept.stdout
    assert [each["event"] for each in lines_of(place, "--failed", "--fleet", "test", "ping")] == ["failed"]
    assert place.callboard("logs", "--failed", "--list").stdout.split() == ["control", "launcher", "ping"]
    assert (
        place.callboard("logs", "--failed", "--fleet", "x").stderr
        == 'callboard: no logs are kept: no fleet "x" has failed\n'
    )
    folder = place.folder / "state/callboard/failed/test"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in folder.iterdir())


def test_a_fleet_that_ends_well_or_never_began_leaves_no_logs(place: Any) -> None:
    place.callboard("up", place.actor_fleet(), "--detach")
    place.callboard("down")
    place.callboard("up", str(place.write("nonsense = 1\n", "bad.toml")))
    assert not (place.folder / "state").exists()
    done = place.callboard("logs", "--failed")
    assert (done.returncode, done.stderr) == (2, "callboard: no logs are kept: no fleet has failed\n")


def test_kept_logs_are_few_and_each_is_cut_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    logs = tmp_path / "logs"
    logs.mkdir()
    assert not keep_logs(logs, kept_at("empty"))
    assert not keep_logs(tmp_path / "nowhere", kept_at("empty"))
    (logs / "a.log").write_bytes(b"".join(line(number % 60, f"{number} " + "x" * 5000) for number in range(500)))
    for number in range(MOST_FLEETS + 5):
        folder = kept_at(f"fleet-{number}")
        assert keep_logs(logs, folder)
        os.utime(folder, (number, number))
    assert len(list((tmp_path / "state/callboard/failed").iterdir())) == MOST_FLEETS
    (tmp_path / "state/callboard/failed/gone").symlink_to(tmp_path / "nowhere")
    os.utime(tmp_path / "state/callboard/failed/gone", (0, 0), follow_symlinks=False)
    assert keep_logs(logs, folder), "whatever else lies there"
    (tmp_path / "state/callboard/failed/gone").unlink()
    kept = find_kept(None)
    assert kept.name == f"fleet-{MOST_FLEETS + 4}"
    [path] = kept.iterdir()
    assert path.stat().st_size <= MOST_FILE_BYTES
    found = [each.line for each in LogFile(path).lines()]
    assert None not in found
    assert found[-1] is not None
    assert found[-1].event.startswith("499 ")
