"""Engines and tracers that are killed and stopped at random, while requests run: only what was in flight is lost."""

import json
import os
import random
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from served_fleet import ServedFleet
from waiting import PATIENCE_S

Eventually = Callable[..., None]


class Tracer:
    """A ``callboard trace --format jsonl``, which may be stopped, and what it has printed."""

    def __init__(self, place: Any) -> None:
        self.process = place.start("trace", "--format", "jsonl", "--last", "0")
        self.objects: list[dict[str, Any]] = []
        self.is_stopped = False
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            if line.endswith("\n"):
                self.objects.append(json.loads(line))

    def seen(self) -> str:
        return f"{len(self.answered())} answers, and {self.kinds()}"

    def kinds(self) -> list[str]:
        return [each["kind"] for each in list(self.objects) if each["type"] == "notice"]

    def answered(self) -> list[str]:
        """The requests whose HTTP answer was told of."""
        return [each["request"] for each in list(self.objects) if each.get("verb") == "http"]

    def stop_or_go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT if self.is_stopped else signal.SIGSTOP)
        self.is_stopped = not self.is_stopped

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)
        self._reading.join(PATIENCE_S)
        for pipe in (self.process.stdout, self.process.stderr):
            pipe.close()


def answers_again(fleet: ServedFleet, wanted: list[str]) -> bool:
    wanted.append(f"again-{len(wanted)}")
    return fleet.complete("Are you there?", request_id=wanted[-1])[0] == 200


@pytest.mark.parametrize("seed", [int(os.environ.get("CALLBOARD_TEST_SEED", "1"))])
def test_whatever_is_killed_or_stopped_requests_go_on_and_the_tracer_says_what_it_missed(
    place: Any, eventually: Eventually, seed: int
) -> None:
    rng, fleet = random.Random(seed), ServedFleet(place)
    tracer, doomed = Tracer(place), Tracer(place)
    eventually(lambda: "following" in tracer.kinds() and "following" in doomed.kinds())
    num_killed, wanted = 0, []
    with ThreadPoolExecutor(4) as pool:
        for round_ in range(12):
            names = [f"r{round_}-{number}" for number in range(8)]
            answers = [pool.submit(fleet.complete, "Who are you?", max_tokens=24, request_id=name) for name in names]
            deed = rng.choice(("engine", "engine", "stop", "tracer")) if round_ % 2 else "none"
            if deed == "engine" and num_killed < 3:
                num_killed += 1
                os.kill(fleet.rows()[rng.choice(("prefill", "decode"))]["pid"], signal.SIGKILL)
            elif deed == "stop":
                tracer.stop_or_go_on()
            elif deed == "tracer":
                doomed.kill()
                doomed = Tracer(place)
            wanted.extend(names)
            codes = {answer.result()[0] for answer in answers}
            if deed != "engine":
                assert codes == {200}
            else:  # The only engine of its role is starting anew.
                assert codes <= {200, 503}
                eventually(lambda: answers_again(fleet, wanted))
    assert num_killed
    if tracer.is_stopped:
        tracer.stop_or_go_on()
    eventually(lambda: len(tracer.answered()) >= len(wanted))
    eventually(lambda: tracer.kinds().count("back") >= num_killed)
    kinds = tracer.kinds()
    assert kinds.count("died") + kinds.count("cut") >= num_killed
    assert sorted(tracer.answered()) == sorted(wanted)
    assert not any(each.get("num_lost") for each in tracer.objects)
    tracer.process.send_signal(signal.SIGINT)
    assert tracer.process.wait(PATIENCE_S) == 0
    for each in (tracer, doomed):
        each.kill()
