"""``callboard trace export`` on a running fleet and on a recording: what it writes, and what it says."""

import argparse
import io
import sys

import pytest
from chrome_trace import read
from served_fleet import ServedFleet
from waiting import PATIENCE_S

from callboard.tools.errors import CliError
from callboard.tools.trace import export


def test_a_fleet_is_exported_to_every_tool(fleet: ServedFleet) -> None:
    place = fleet.place
    for name in ("alpha-1", "alpha-2", "beta"):
        assert fleet.complete(f"the quick brown fox, {name}", request_id=name)[0] == 200
    wrote = place.callboard("trace", "export", "perfetto", "-o", "trace.json", "--last", "3")
    assert (wrote.returncode, wrote.stdout) == (0, "")
    assert wrote.stderr == "trace.json: 3 requests: open it at https://ui.perfetto.dev\n"
    trace = read((place.folder / "trace.json").read_bytes())
    assert {each.args["request"] for each in trace.slices} == {"alpha-1", "alpha-2", "beta"}
    assert [name for name in trace.threads.values() if "#" not in name] == [
        "frontend",
        "main",
        "kv-cpu0",
        "kv-cpu1",
        "prefill",
        "decode",
    ]
    assert {"prep_recv", "remote_send", "start_generate"} <= {target.name for _, target in trace.flows}
    assert trace.about["fleet"] == "test"

    wrote = place.callboard("trace", "export", "html", "alpha", "beta", "-o", "trace.html")
    assert wrote.returncode == 2
    assert '2 requests begin with "alpha": alpha-1, alpha-2' in wrote.stderr
    assert not (place.folder / "trace.html").exists()
    wrote = place.callboard("trace", "export", "html", "alpha-1", "bet", "-o", "trace.html")
    assert (wrote.returncode, wrote.stderr) == (0, "trace.html: 2 requests: open it in a browser\n")
    assert b'"id":"beta"' in (place.folder / "trace.html").read_bytes()
    assert sorted(path.name for path in place.folder.glob("*trace.html*")) == ["trace.html"]

    # Options may stand between what is written and of which requests.
    wrote = place.callboard("trace", "export", "html", "-o", "trace.html", "beta", "--last", "5", "alpha-2")
    assert (wrote.returncode, wrote.stderr) == (0, "trace.html: 2 requests: open it in a browser\n")

    printed = place.callboard("trace", "export", "mermaid")
    assert (printed.returncode, printed.stderr) == (0, "")
    assert printed.stdout.count("sequenceDiagram") == 1
    assert place.callboard("trace", "export", "mermaid", "--last", "2").stdout.count("sequenceDiagram") == 2


def test_a_recording_is_exported_as_the_fleet_is(fleet: ServedFleet) -> None:
    place = fleet.place
    recording = place.start("trace", "record", "it.cbtrace", "--requests", "1")
    assert recording.stderr is not None
    recording.stderr.readline()
    fleet.complete("what is recorded", request_id="exported")
    _, said = recording.communicate(timeout=PATIENCE_S)
    assert recording.returncode == 0, said
    for to in ("perfetto", "html", "mermaid"):
        of_fleet = place.run("trace", "export", to, "--last", "1", "-o", f"fleet.{to}")
        of_file = place.run("trace", "export", to, "--last", "1", "--from", "it.cbtrace", "-o", f"file.{to}")
        assert (of_fleet.returncode, of_file.returncode) == (0, 0), of_file.stderr
    assert (place.folder / "fleet.mermaid").read_text() == (place.folder / "file.mermaid").read_text()
    ours, theirs = (read((place.folder / f"{name}.perfetto").read_bytes()) for name in ("fleet", "file"))
    assert [each.name for each in ours.slices] == [each.name for each in theirs.slices]
    assert list(ours.threads.values()) == list(theirs.threads.values())


def test_what_cannot_be_done_is_one_sentence(fleet: ServedFleet) -> None:
    place = fleet.place
    (place.folder / "broken").write_bytes(b"no recording")
    for words, sentence in (
        (("perfetto", "gamma", "-o", "x"), 'no node remembers a request "gamma"'),
        (("perfetto", "-o", "nowhere/x"), "cannot write nowhere/x: No such file or directory"),
        (("html", "--last", "0", "-o", "x"), "--last 0 leaves nothing to export"),
        (("html", "--from", "missing", "-o", "x"), "there is no recording missing"),
        (("html", "--from", "broken", "-o", "x"), "is no recording"),
        (("html", "--fleet", "other", "-o", "x"), 'no fleet "other" is running'),
    ):
        ran = place.run("trace", "export", *words)
        assert (ran.returncode, ran.stdout) == (2, ""), ran.stderr
        assert sentence in ran.stderr
        assert len(ran.stderr.splitlines()) == 1
    assert not (place.folder / "x").exists()


def test_a_page_is_not_poured_into_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    asked = argparse.Namespace(to="html", output=None, endpoint=None)
    with pytest.raises(CliError, match=r"name a file, as in -o trace.html$"):
        export.run(asked)
