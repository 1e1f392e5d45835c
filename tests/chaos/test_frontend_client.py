"""The frontend's text state in simulation, and that the client which checks it sees what is wrong with it."""

import asyncio
from collections.abc import Callable
from random import Random
from typing import Any
from unittest.mock import patch

import msgspec
import pytest
from fleet import running_fleet

from callboard.actors.engine.simulated import SimulatedRunner, Simulation
from callboard.actors.frontend.routers import Routers
from callboard.actors.frontend.text import Detokenizer, SequenceText, StopStrings
from callboard.bus import VirtualClock
from callboard.bus.testing import run_virtual
from callboard.bus.transports.sim import SimHub

from .frontend_client import Answered, FrontendClient, token_data, tokenizer_of

NUM_REQUESTS = 30


def answers(seed: int) -> list[Answered]:
    """Serve requests drawn from a seed, all at once."""
    rng = Random(seed)
    simulation = Simulation(
        num_layers=2, vocab_size=rng.choice([50, 1000]), eos_token_id=rng.choice([None, 7]), seconds_per_step=0.002
    )
    layout = SimulatedRunner(simulation).layout

    async def main() -> list[Answered]:
        async with running_fleet(
            layout=layout, hub=SimHub(seed), clock=VirtualClock(), seed=seed, simulated=simulation, num_blocks=64
        ) as fleet:
            node = fleet.nodes["control"]
            routers = Routers(node, only=fleet.router.address)
            client = FrontendClient(node, routers, simulation, max_model_len=64 * 16)
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(client.request(rng, f"r{i}")) for i in range(NUM_REQUESTS)]
            await asyncio.sleep(30)
            await fleet.assert_nothing_leaks()
            return [task.result() for task in tasks]

    return run_virtual(main)


@pytest.mark.parametrize("seed", range(8))
def test_every_client_gets_the_right_text_and_one_end(seed: int) -> None:
    got = answers(seed)
    assert [(each.request_id, each.problems) for each in got if each.problems] == []
    assert sum(each.state == "finished" for each in got) >= NUM_REQUESTS // 2
    assert {each.state for each in got} <= {"finished", "left"}, [each.error for each in got]


def test_the_tokenizer_cuts_characters_in_pieces() -> None:
    tokenizer = tokenizer_of(1000, None)
    ids = Random(1).choices(range(1000), k=2000)
    data = b"".join(token_data(id, 1000) for id in ids if id != 999)
    assert tokenizer.decode(ids) == data.decode(errors="replace")
    whole = "".join(token_data(id, 1000).decode(errors="replace") for id in ids if id != 999)
    num_lost = whole.count("\ufffd") - tokenizer.decode(ids).count("\ufffd")
    assert num_lost > 100, "characters are whole although their tokens are not"
    assert tokenizer.decode(tokenizer.encode("Größe 👍", add_special_tokens=False)) == "Größe 👍"


def half_characters() -> Any:
    def push(self: Detokenizer, id: int) -> str:
        return "" if self._tokenizer.is_special(id) else self._tokenizer.decode([id])

    return patch.object(Detokenizer, "push", push)


def a_stop_string_that_is_seen_only_in_one_piece() -> Any:
    def push(self: StopStrings, piece: str) -> str:
        matches = [start for stop in self._stops if (start := piece.find(stop)) >= 0]
        self.is_matched |= bool(matches)
        return piece[: min(matches)] if matches else piece

    return patch.object(StopStrings, "push", push)


def a_lost_tail() -> Any:
    return patch.object(StopStrings, "flush", lambda self: "")


def an_end_mark_that_shows() -> Any:
    push = SequenceText.push

    def show(self: SequenceText, token: Any) -> Any:
        if token.finish_reason == "stop":
            token = msgspec.structs.replace(token, finish_reason="length")
        return push(self, token)

    return patch.object(SequenceText, "push", show)


@pytest.mark.parametrize(
    "plant",
    [half_characters, a_stop_string_that_is_seen_only_in_one_piece, a_lost_tail, an_end_mark_that_shows],
)
def test_the_client_sees_what_is_wrong_with_the_text(plant: Callable[[], Any]) -> None:
    with plant():
        assert any(each.problems for seed in range(6) for each in answers(seed))
