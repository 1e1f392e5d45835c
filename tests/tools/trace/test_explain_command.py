"""``callboard trace explain`` as users type it, on a running fleet and on a recording."""

import json
from typing import Any

import pytest
from served_fleet import ServedFleet
from waiting import PATIENCE_S


@pytest.fixture(scope="module")
def asked(place_of_module: Any) -> ServedFleet:
    """A fleet of its own: which request is the slowest is known, and how many there are."""
    made = ServedFleet(place_of_module)
    for name in ("alpha-1", "alpha-2", "beta"):
        assert made.complete(f"the quick brown fox, {name}", request_id=name)[0] == 200
    return made


def test_a_request_is_explained_to_people_and_to_machines(asked: ServedFleet) -> None:
    place = asked.place
    last = place.callboard("trace", "explain")
    assert (last.returncode, last.stderr) == (0, "")
    assert last.stdout.startswith("Request beta at ")
    for word in ("prep_recv", "remote_send", "start_generate", "Script disaggregate", "unexplained", "in all"):
        assert word in last.stdout
    assert "\x1b" not in last.stdout
    named = json.loads(place.callboard("trace", "explain", "alpha-1", "--json").stdout)
    assert (named["request_id"], named["is_over"], named["missing_nodes"]) == ("alpha-1", True, {})
    assert named["breakdown"]["explained_share"] > 0.5  # Engines that compute nothing: what is left is overhead.
    slowest = json.loads(place.callboard("trace", "explain", "--slowest", "--json").stdout)
    told = [json.loads(place.run("trace", "explain", name, "--json").stdout) for name in ("alpha-2", "beta")]
    assert slowest["jct_ms"] == max(each["jct_ms"] for each in [named, *told])
    assert set(asked.rows()) == {"decode", "frontend", "kv-cpu0", "kv-cpu1", "main", "prefill"}


def test_what_cannot_be_explained_is_one_sentence(asked: ServedFleet) -> None:
    for words, sentence in (
        (("gamma",), 'no node remembers a request "gamma": 3 are known'),
        (("alpha-11",), 'no node remembers a request "alpha-11": do you mean alpha-1'),
        (("alpha",), '2 requests begin with "alpha": alpha-1, alpha-2'),
        (("beta", "--slowest"), "give a request or --slowest, not both"),
        (("--fleet", "other"), 'no fleet "other" is running'),
        (("--from", "nothing.cbtrace"), "nothing.cbtrace"),
        (("--fleet", "test@tcp://127.0.0.1:9"), "127.0.0.1:9"),
    ):
        ran = asked.place.run("trace", "explain", *words)
        assert (ran.returncode, ran.stdout) == (2, ""), ran.stderr
        assert sentence in ran.stderr
        assert len(ran.stderr.splitlines()) == 1


def test_a_recording_is_explained_as_the_fleet_is(fleet: ServedFleet) -> None:
    place = fleet.place
    recording = place.start("trace", "record", "it.cbtrace", "--requests", "1")
    assert recording.stderr is not None
    recording.stderr.readline()
    assert fleet.complete("what is recorded", request_id="explained")[0] == 200
    recording.communicate(timeout=PATIENCE_S)
    path = place.folder / "it.cbtrace"
    (place.folder / "cut.cbtrace").write_bytes(path.read_bytes()[:-20])
    cut = place.callboard("trace", "explain", "--from", "cut.cbtrace")
    assert (cut.returncode, cut.stdout) == (2, "")
    assert "cut.cbtrace is damaged: it is cut off" in cut.stderr
    whole = place.callboard("trace", "explain", "--from", "cut.cbtrace", "--partial")
    assert whole.stdout.startswith("Request explained at ")
    assert "cut.cbtrace is damaged: it is cut off" in whole.stderr
    recorded = json.loads(place.callboard("trace", "explain", "explained", "--json", "--from", "it.cbtrace").stdout)
    live = json.loads(place.callboard("trace", "explain", "explained", "--json").stdout)
    assert [span["name"] for span in recorded["spans"]] == [span["name"] for span in live["spans"]]
    assert recorded["jct_ms"] == pytest.approx(live["jct_ms"], abs=1e-3)
    for text in (b"", b"no recording at all, but long enough to have a head " * 9):
        (place.folder / "bad.cbtrace").write_bytes(text)
        ran = place.run("trace", "explain", "--from", "bad.cbtrace")
        assert (ran.returncode, len(ran.stderr.splitlines())) == (2, 1)
