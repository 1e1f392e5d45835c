"""Messages that are wrong in every way, to real actors: a short run of ``make fuzz``, and that it can fail at all."""

import inspect

import pytest
from fuzz.in_process import FuzzError, fuzz, fuzzed_fleet, on_fuzz_loop, replay
from fuzz.over_zmq import run_over_zmq
from fuzz.recorder import Corpus, record

from callboard.actors import protocol, trace_protocol
from callboard.actors.directory import Directory
from callboard.actors.protocol import Done, Unregister
from callboard.bus import Ask, Message, Stream, Tell
from callboard.bus.frames import AnyFrame

NOT_SENT_ALONE = {"SubRequest", "TakePages"}  # The fleet that is recorded maps its pools.
MOST_GROWTH_MIB = 16


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return record()


def test_the_recording_has_every_frame_and_every_message(corpus: Corpus) -> None:
    known = (*vars(protocol).values(), *vars(trace_protocol).values())
    named = [kind for kind in known if inspect.isclass(kind) and issubclass(kind, Message)]
    messages = {kind.__name__ for kind in named if kind not in (Message, Ask, Stream, Tell)}
    assert messages - {kind.partition("/")[2] for kind in corpus} == NOT_SENT_ALONE
    assert {kind.__name__ for kind in AnyFrame.__args__} == {kind.partition("/")[0] for kind in corpus}


@pytest.mark.parametrize("seed", [1, 2])
def test_no_wrong_message_ends_an_actor_goes_unanswered_or_is_kept(corpus: Corpus, seed: int) -> None:
    totals = on_fuzz_loop(lambda: fuzz(corpus, seed, 10_000, lambda _: None))
    assert totals.counts["malformed"] > 1000
    assert totals.counts["questions"] > 2000
    assert totals.num_refused > 2000
    assert totals.growth_mib < MOST_GROWTH_MIB


def test_what_crashes_an_actor_is_found_and_replayed(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(self: Directory, message: Unregister) -> Done:
        raise ZeroDivisionError

    monkeypatch.setattr(Directory, "on_unregister", break_down)
    with pytest.raises(FuzzError, match="ZeroDivisionError") as caught:
        on_fuzz_loop(lambda: fuzz(corpus, 1, 10_000, lambda _: None))
    with pytest.raises(FuzzError, match="ZeroDivisionError"):
        on_fuzz_loop(lambda: replay(corpus, caught.value.lines))


def test_a_run_is_a_function_of_its_seed(corpus: Corpus) -> None:
    async def batches(seed: int) -> list[bytes]:
        async with fuzzed_fleet(corpus, seed) as world:
            for _ in range(8):
                await world.burst(64)
            return [batch for line in world.peer.lines for batch in line.log]

    first, second, other = (on_fuzz_loop(lambda seed=seed: batches(seed)) for seed in (3, 3, 4))
    assert first == second != other


def test_a_node_in_another_process_lives_through_what_bare_sockets_send(corpus: Corpus) -> None:
    totals = run_over_zmq(corpus, 1, 1000, lambda _: None)
    assert totals.counts["malformed"] > 100
    assert totals.num_refused > 100
