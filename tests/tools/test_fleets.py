"""Fleets of real processes: they come up, come back, end in order, and leave nothing."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from my_actors import Die, Greet, Hang
from served_fleet import state_of
from waiting import PATIENCE_S

Eventually = Callable[..., None]


def test_a_users_actor_starts_from_a_fleet_file_and_answers(place: Any) -> None:
    done = place.callboard("up", place.actor_fleet(options='{ greeting = "hello" }'), "--detach")
    assert (done.returncode, "Fleet test is up." in done.stdout) == (0, True)
    assert place.ask(Greet("you")) == "hello you"
    row = place.row()
    assert (row["kind"], row["state"]) == ("actor", "ready")
    assert row["pid"] in place.processes()
    assert place.callboard("logs", "--list").stdout.split() == ["control", "launcher", "ping"]
    assert "ready" in place.callboard("logs", "ping").stdout
    assert "ping" in place.callboard("ps").stdout
    assert place.callboard("down").returncode == 0
    assert place.is_empty()


def test_a_crashed_actor_and_a_killed_control_process_come_back_and_the_log_says_why(
    place: Any, eventually: Eventually
) -> None:
    place.callboard("up", place.actor_fleet(), "--detach")
    before = place.row()["pid"]
    assert place.ask(Die()) == "ActorDied"
    eventually(lambda: place.row()["num_restarts"] == 1 and place.row()["state"] == "ready")
    assert place.row()["pid"] not in (0, before)
    assert place.ask(Greet("again")) == "hi again"
    assert "RuntimeError: a bug" in place.callboard("logs", "ping").stdout

    os.kill(place.row("control")["pid"], signal.SIGKILL)
    eventually(lambda: place.row("control")["num_restarts"] == 1)
    eventually(lambda: place.row()["address"] != "")
    assert place.ask(Greet("you")) == "hi you"

    done = place.run("metrics")
    assert (done.returncode, done.stderr) == (2, 'callboard: fleet "test" has no frontend, and so no metrics\n')
    command = f"{sys.executable} -P -m callboard.tools.cli logs | head -n 1"  # A reader that leaves is no error.
    left = subprocess.run(["bash", "-c", command], env=place.env, capture_output=True, text=True, timeout=20)
    assert (left.returncode, left.stderr) == (0, "")


def test_an_actor_that_fails_too_often_is_given_up_shown_and_its_logs_are_kept(
    place: Any, eventually: Eventually
) -> None:
    place.callboard("up", place.actor_fleet(restart='{ backoff = "10ms", max = 0 }'), "--detach")
    place.ask(Die())
    eventually(lambda: place.row()["state"] == "failed")
    assert "ping: RuntimeError: a bug" in place.row()["detail"]
    assert json.loads(place.callboard("ps", "--json").stdout)[0]["state"] == "ready"
    shown = place.callboard("top", "--once", "--interval", "0.2").stdout
    assert "ping is failed: ping: RuntimeError: a bug" in shown
    place.callboard("down")
    assert "RuntimeError: a bug" in place.callboard("logs", "--failed").stdout


def test_ctrl_c_stops_a_fleet_in_the_foreground(place: Any) -> None:
    up = place.start("up", place.actor_fleet())
    assert any("Fleet test is up." in line for line in up.stdout)
    assert len(place.processes()) == 3
    up.send_signal(signal.SIGINT)
    _, errors = up.communicate(timeout=PATIENCE_S)
    assert (up.returncode, "Traceback" in errors) == (0, False)
    assert place.is_empty()


def test_ctrl_c_while_starting_leaves_nothing(place: Any, eventually: Eventually) -> None:
    for words in (["up"], ["up", "--detach"]):
        up = place.start(*words, place.actor_fleet("NeverReady"))
        eventually(lambda: any(place.runtime.glob("callboard/test/ping.sock")))
        up.send_signal(signal.SIGINT)
        _, errors = up.communicate(timeout=PATIENCE_S)
        assert "Traceback" not in errors
        eventually(place.is_empty)


def test_ctrl_c_does_not_wait_for_a_model_that_is_being_read(place: Any, eventually: Eventually) -> None:
    up = place.start("up", place.actor_fleet("Loading"))
    eventually(lambda: any(place.runtime.glob("callboard/test/ping.sock")))
    up.send_signal(signal.SIGINT)
    _, errors = up.communicate(timeout=7.5)  # The supervisor kills after 8 s.
    assert (up.returncode, "stopping" in errors) == (0, True)
    assert place.is_empty()


def test_killing_the_launcher_leaves_no_process_and_no_run_directory_and_keeps_the_logs(
    place: Any, eventually: Eventually
) -> None:
    place.callboard("up", place.actor_fleet(), "--detach")
    os.kill(state_of(place).state.launcher_pid, signal.SIGKILL)
    eventually(place.is_empty)
    assert "the launcher is gone" in place.callboard("logs", "--failed", "control").stdout


def test_killing_the_launcher_ends_even_an_actor_that_hangs(place: Any, eventually: Eventually) -> None:
    up = place.start("up", place.actor_fleet())
    assert any("Fleet test is up." in line for line in up.stdout)
    assert place.ask(Hang(), timeout=0.2) == "AskTimeout"
    up.kill()
    up.communicate(timeout=PATIENCE_S)
    eventually(place.is_empty)


def test_what_a_launcher_left_that_was_killed_before_it_had_processes_is_removed_by_ps(place: Any) -> None:
    folder = place.runtime / "callboard" / "gone"
    (folder / "logs").mkdir(parents=True)
    (folder / "lock").touch()
    (place.runtime / "callboard").chmod(0o700)
    assert place.callboard("ps").stdout.startswith("No fleet is running")
    assert place.is_empty()


def test_what_a_fleet_left_that_was_killed_as_a_whole_is_cleared_but_for_its_logs(place: Any) -> None:
    fleet = place.actor_fleet()
    place.callboard("up", fleet, "--detach")
    for pid in sorted(place.processes()):
        os.kill(pid, signal.SIGSTOP)
    for pid in sorted(place.processes()):
        os.kill(pid, signal.SIGKILL)
    assert list(place.runtime.glob("callboard/test/*.sock"))
    assert place.callboard("ps").stdout.startswith("No fleet is running")
    assert "the fleet is up" in place.callboard("logs", "--failed", "launcher").stdout
    assert place.callboard("up", fleet, "--detach").returncode == 0
    assert place.ask(Greet("you")) == "hi you"


def test_a_second_fleet_of_one_name_is_refused_and_one_of_another_name_is_not(place: Any) -> None:
    fleet = place.actor_fleet()
    place.callboard("up", fleet, "--detach")
    again = place.callboard("up", fleet)
    assert again.returncode == 2
    assert 'a fleet "test" is running already' in again.stderr
    assert "callboard down test" in again.stderr
    detached = place.callboard("up", fleet, "--detach")
    assert (detached.returncode, len(detached.stderr.splitlines())) == (2, 1)
    assert place.callboard("up", fleet, "--detach", "--name", "other").returncode == 0
    assert "name one of other, test" in place.callboard("down").stderr
    assert place.callboard("down", "--all").returncode == 0
    assert place.is_empty()


def test_an_actor_that_cannot_start_fails_the_fleet_with_its_own_sentence(place: Any) -> None:
    cases = {
        ("Refusing", "{}"): "ping: OSError: the moon is not in the right phase (my_actors.py:",
        ("Nobody", "{}"): "ping: module my_actors has no class Nobody",
        ("os", "{}"): "ping: os in module my_actors is no class",
        ("Ping", "{ greting = 1 }"): "ping: Ping does not take these options",
    }
    for number, ((kind, options), sentence) in enumerate(cases.items()):
        for words in ([], ["--detach"])[: 2 if number == 0 else 1]:
            done = place.callboard("up", place.actor_fleet(kind, options), *words)
            assert (done.returncode, sentence in done.stderr) == (1, True)
            assert done.stderr.count("ping failed") == 1
            assert place.is_empty()
