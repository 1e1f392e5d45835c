"""``callboard trace record`` and ``callboard replay`` with a real fleet, where recorders and engines are killed."""

import json
import os
import signal
import stat
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from served_fleet import ServedFleet
from waiting import PATIENCE_S

from callboard.bus.taps import ENDED, SENT
from callboard.tools.trace.recording import Noticed, Recording, read_recording

FULL = '[trace]\nprompts = "full"\n'


@contextmanager
def recorder(fleet: ServedFleet, *words: str, path: str = "a.rec") -> Iterator[subprocess.Popen[str]]:
    """A recorder that follows the fleet; it is waited for at the end."""
    process = fleet.place.start("trace", "record", path, *words)
    try:
        for line in process.stderr:
            if "now following" in line:
                break
        yield process
        process.wait(PATIENCE_S)
    finally:
        process.kill()
        process.communicate()


def prompts(num: int, seed: int = 0) -> list[str]:
    """Some of them begin alike, and none as those of another seed."""
    rng = Random(seed)
    beginnings = [f"{seed} {beginning}" for beginning in ("", "a" * 64, "b" * 160)]
    return [rng.choice(beginnings) + "".join(rng.choices("abcdef ", k=rng.randrange(10, 200))) for _ in range(num)]


def ask(fleet: ServedFleet, num: int, *, seed: int = 0, max_tokens: int = 8) -> None:
    for prompt in prompts(num, seed):
        status, body = fleet.complete(prompt, max_tokens=max_tokens)
        assert status == 200, body


def ask_for_two(fleet: ServedFleet) -> None:
    """Two answers to one prompt are two sequences of one request."""
    body = {"model": "tiny", "prompt": "twice " * 20, "max_tokens": 4, "n": 2, "temperature": 1.0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{fleet.url}/v1/completions", json.dumps(body).encode(), headers={"content-type": "application/json"}
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=PATIENCE_S) as answer:
        assert len(json.load(answer)["choices"]) == 2


def generates(recording: Recording) -> int:
    """How many Generates were asked and ended in it."""
    spans: dict[int, set[int]] = {}
    for event in recording.events:
        if event.record.name == "Generate":
            spans.setdefault(event.record.span, set()).add(event.record.what)
    return sum({SENT, ENDED} <= whats for whats in spans.values())


def notices(recording: Recording) -> list[Noticed]:
    return [chunk for chunk in recording.chunks() if isinstance(chunk, Noticed)]


def path_of(fleet: ServedFleet, name: str = "a.rec") -> Path:
    found: Path = fleet.place.folder / name
    return found


# ---- recording ------------------------------------------------------------------------------------------------------


def test_a_recording_ends_after_so_many_requests_and_holds_all_of_them(fleet: ServedFleet) -> None:
    with recorder(fleet, "--requests", "12") as process:
        ask(fleet, 12)
    assert process.returncode == 0
    recording = read_recording(path_of(fleet))
    assert stat.S_IMODE(path_of(fleet).stat().st_mode) == 0o600
    assert generates(recording) == 12
    assert recording.whole.num_lost == 0
    names = {event.record.name for event in recording.events}
    assert {"PrepRecv", "RemoteSend", "StartGenerate", "Admit", "prefill", "decode"} <= names
    assert {event.node for event in recording.events} == {"control", "kv-cpu0", "kv-cpu1", "prefill", "decode"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_recording_in_order(fleet: ServedFleet, number: int) -> None:
    with recorder(fleet) as process:
        ask(fleet, 3)
        process.send_signal(number)
        out, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert "Recorded 3 requests" in out
    assert "callboard replay a.rec" in out
    assert generates(read_recording(path_of(fleet))) == 3


def test_a_recording_ends_after_its_time(fleet: ServedFleet) -> None:
    with recorder(fleet, "--for", "1s") as process:
        pass
    assert process.returncode == 0
    assert generates(read_recording(path_of(fleet))) == 0


def test_prompts_are_not_in_a_recording_unless_the_fleet_allows_it(place: Any) -> None:
    fleet = ServedFleet(place, more=FULL)
    secret = "the secret of the moon is cheese " * 4
    for name in ("hashed", "none", "full"):
        with recorder(fleet, "--requests", "1", "--prompts", name, path=f"{name}.rec"):
            fleet.complete(secret)

    def kept(name: str) -> bytes:
        records = [event.record for event in read_recording(path_of(fleet, f"{name}.rec")).events]
        return b"".join(bytes(record.body) + bytes(record.facts) for record in records)

    # Prompts travel as int32 ids, and the tokens of this model are bytes.
    body = next(
        bytes(event.record.body)
        for event in read_recording(path_of(fleet, "full.rec")).events
        if event.record.name == "Generate" and event.record.what == SENT
    )
    prompt = msgspec.msgpack.decode(body)["prompt"]
    assert len(prompt) == 4 * len(secret)
    assert prompt[:64] in kept("full")
    assert prompt[:64] not in kept("hashed")
    assert prompt[:64] not in kept("none")
    assert b"hashes" in kept("hashed")
    assert b"hashes" not in kept("none")


def test_full_prompts_are_refused_where_the_fleet_does_not_give_them(fleet: ServedFleet) -> None:
    refused = fleet.place.callboard("trace", "record", "a.rec", "--prompts", "full")
    assert refused.returncode == 2
    assert "hashes only" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not path_of(fleet).exists()


# ---- killing --------------------------------------------------------------------------------------------------------


def num_whole(fleet: ServedFleet) -> int:
    """How many requests have been written down whole."""
    return generates(read_recording(path_of(fleet), is_partial=True))


def test_a_killed_recorder_harms_nobody_and_leaves_what_it_had(
    fleet: ServedFleet, eventually: Callable[..., None]
) -> None:
    with recorder(fleet) as process:
        ask(fleet, 10)
        eventually(lambda: num_whole(fleet) >= 10)
        with background(lambda: ask(fleet, 20, seed=1)):
            threading.Event().wait(0.2)
            process.kill()
    assert fleet.complete("still there?")[0] == 200
    refused = fleet.place.callboard("replay", "a.rec", "--simulate")
    assert refused.returncode == 2
    assert "its recorder was killed" in refused.stderr
    assert "--partial goes on with what is whole" in refused.stderr
    recording = read_recording(path_of(fleet), is_partial=True)
    assert 10 <= generates(recording) <= 30
    replayed = fleet.place.callboard("replay", "a.rec", "--simulate", "--partial", "--json")
    assert replayed.returncode == 0, replayed.stderr
    assert json.loads(replayed.stdout)["summary"]["num_requests"] >= 10


@contextmanager
def background(work: Callable[[], None]) -> Iterator[None]:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    assert not errors, errors


def test_a_recording_goes_on_without_a_killed_engine_and_ends_with_its_fleet(
    place: Any, eventually: Callable[..., None]
) -> None:
    fleet = ServedFleet(place)
    with recorder(fleet) as process:
        ask(fleet, 3)
        pid = fleet.rows()["decode"]["pid"]
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: fleet.rows().get("decode", {}).get("pid", pid) not in (pid, None))
        eventually(lambda: fleet.complete("are you back?")[0] == 200)
        eventually(lambda: num_whole(fleet) >= 4)
        place.callboard("down")
        out, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert "has ended" in out
    recording = read_recording(path_of(fleet))
    kinds = [(notice.kind, notice.node) for notice in notices(recording)]
    assert ("died", "decode") in kinds or ("cut", "decode") in kinds
    assert ("back", "decode") in kinds or ("came", "decode") in kinds
    assert generates(recording) >= 4
    replayed = place.callboard("replay", "a.rec", "--simulate")
    assert replayed.returncode == 0, replayed.stderr
    assert "in a replay nobody does" in replayed.stdout

    # And a fleet that serves other models is not asked.
    text = (place.folder / "fleet.toml").read_text()
    place.write(text.replace("models.tiny", "models.huge"))
    assert place.callboard("up", "fleet.toml", "--detach").returncode == 0
    refused = place.run("replay", "a.rec")
    assert refused.returncode == 2
    assert 'fleet "test" serves huge, and the recording asks for "tiny"' in refused.stderr


# ---- replaying ------------------------------------------------------------------------------------------------------


def test_a_running_fleet_is_asked_again(fleet: ServedFleet) -> None:
    with recorder(fleet, "--requests", "15"):
        ask(fleet, 13, seed=2)
        ask_for_two(fleet)
    place = fleet.place
    live = place.callboard("replay", "a.rec", "--json", "--speed", "4")
    assert live.returncode == 0, live.stderr
    report = json.loads(live.stdout)
    assert "against the running fleet" in report["replayed_by"]
    assert report["summary"]["num_requests"] == 15
    assert report["summary"]["num_errors"] == [0, 0]
    assert report["summary"]["num_engines_differ"] == 0
    ids = {row["id"] for row in report["requests"]}
    twins = {name.removesuffix(".1") for name in ids if name.endswith(".1")}
    assert len(ids) == 15
    assert len(twins) == 1
    for row in report["requests"]:
        for decisions in row["decisions"]:
            assert decisions[0].startswith("prep_recv decode")
            assert decisions[-1].startswith("start_generate decode")
        assert None not in row["ttft_s"]
    # Of two at a time, at this speed, the later one may not find what the earlier one has yet to leave in the cache.
    alone = [row for row in report["requests"] if row["id"].removesuffix(".1") not in twins]
    assert all(row["num_cached_tokens"][1] <= row["num_cached_tokens"][0] for row in alone)
    assert all(row["num_bytes"][1] >= row["num_bytes"][0] > 0 for row in alone)
    assert sum(row["num_bytes"][1] == row["num_bytes"][0] for row in alone) >= len(alone) / 2
    assert sum(row["num_cached_tokens"][1] for row in alone) > 0

    # With a script that runs in the replay, against the fleet's engines; the fleet's own goes on.
    other = json.loads(place.callboard("replay", "a.rec", "--json", "--router", "least_loaded", "--speed", "4").stdout)
    assert "run here" in other["script"]
    assert {row["decisions"][1][0].split()[0] for row in other["requests"]} == {"start_generate"}
    assert {row["decisions"][1][0].split()[1] for row in other["requests"]} == {"prefill", "decode"}
    assert set(fleet.rows()) == {"frontend", "main", "prefill", "decode", "kv-cpu0", "kv-cpu1"}
    assert fleet.complete("and you?")[0] == 200

    simulated = json.loads(place.callboard("replay", "a.rec", "--json", "--simulate").stdout)
    assert simulated["summary"]["num_engines_differ"] == 0
    alone = [row for row in simulated["requests"] if row["id"].removesuffix(".1") not in twins]
    assert all(row["num_bytes"][1] >= row["num_bytes"][0] > 0 for row in alone)
    assert sum(row["num_bytes"][1] == row["num_bytes"][0] for row in alone) >= len(alone) / 2
    text = place.callboard("replay", "a.rec", "--simulate", "--router", "balanced").stdout
    assert "the simulation's own error" in text
    assert "fitted to" in text


def test_what_a_live_fleet_cannot_be_asked_is_said_in_a_sentence(fleet: ServedFleet) -> None:
    place = fleet.place
    with recorder(fleet, "--requests", "2"):
        ask(fleet, 2)
    for words, sentence in (
        (("--set", "ratio=0.3"), "name it with --router"),
        (("--router", "none.py"), "there is no such script"),
        (("--fleet", "nobody"), 'no fleet "nobody" is running; running: test'),
        (("--fleet", "tcp://x"), "is no address of a fleet"),
    ):
        refused = place.run("replay", "a.rec", *words)
        assert refused.returncode == 2, words
        assert sentence in refused.stderr
        assert refused.stderr.count("\n") == 1
    for words, sentence in (
        (("a.rec",), "a.rec is there already"),
        (("no/where.rec",), "cannot write no/where.rec"),
        (("b.rec", "--max-size", "1KiB"), "is too small for a file"),
        (("b.rec", "--max-size", "much"), '"much" is no size'),
        (("b.rec", "--for", "long"), '"long" is no duration'),
        (("b.rec", "--files", "0"), "--files 0 would record nothing"),
        (("b.rec", "--fleet", "nobody"), 'no fleet "nobody" is running'),
    ):
        refused = place.run("trace", "record", *words)
        assert refused.returncode == 2, words
        assert sentence in refused.stderr
        assert refused.stderr.count("\n") == 1
    assert not (place.folder / "b.rec").exists()
