"""Pages leave while later layers are computed: how long a send takes, on the virtual clock."""

import asyncio
from typing import Any

import pytest
from fleet import running_fleet

from callboard.actors.engine.simulated import SimulatedRunner, Simulation
from callboard.actors.protocol import PrepRecv, RemoteSend, Sent
from callboard.bus import VirtualClock
from callboard.bus.testing import run_virtual
from callboard.kv.lanes import Pace
from callboard.kv.layout import KvLayout
from callboard.kv.tokens import pack_tokens

MODEL = Simulation(num_layers=16, seconds_per_prefill_token=0.01)
LAYOUT = SimulatedRunner(MODEL).layout
NUM_TOKENS = 200
COMPUTE_S = 2.0
NUM_GROUPS = 8


class Limited(Pace):
    """A lane of so many bytes a second, however many writes share it."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self.free_s = 0.0
        self.most_at_once = self.at_once = 0

    def piece_bytes(self, layout: KvLayout) -> int:
        return 4096

    async def take(self, copy: Any) -> int:
        loop = asyncio.get_running_loop()
        num_bytes: int = copy()
        self.free_s = max(self.free_s, loop.time()) + num_bytes / self.bytes_per_s
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(self.free_s - loop.time())
        self.at_once -= 1
        return num_bytes


def timed_send(share: float, *, num_groups: int = NUM_GROUPS, budget: int = 512) -> tuple[Sent, float, Limited]:
    """Send a prompt over a lane that takes ``share`` of the prefill; return what came of it, and the seconds."""
    outcome: list[tuple[Sent, float, Limited]] = []

    async def story() -> None:
        options = {"simulated": MODEL, "num_layer_groups": num_groups, "max_num_batched_tokens": budget}
        async with running_fleet(layout=LAYOUT, clock=VirtualClock(), **options) as fleet:
            pace = Limited(NUM_TOKENS * LAYOUT.token_bytes / (share * COMPUTE_S))
            fleet.actors["kv-p"].pace = lambda to: pace  # type: ignore[attr-defined]
            prompt = pack_tokens([i * 7 % 1000 for i in range(NUM_TOKENS)])
            reserved = await fleet.managers["kv-d"].ask(PrepRecv("r", 0, prompt))
            begin_s = asyncio.get_running_loop().time()
            message = RemoteSend("r", 0, prompt, reserved.kv, 0, NUM_TOKENS, "p")
            sent = await fleet.managers["kv-p"].ask(message)
            outcome.append((sent, asyncio.get_running_loop().time() - begin_s, pace))

    run_virtual(story)
    return outcome[0]


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0, 2.0])
def test_sending_hides_behind_computing_but_for_the_last_group(share: float) -> None:
    sent, total_s, pace = timed_send(share)
    group_s = max(1.0, share) * COMPUTE_S / NUM_GROUPS
    assert total_s == pytest.approx(max(1.0, share) * COMPUTE_S + min(1.0, share) * COMPUTE_S / NUM_GROUPS, abs=0.05)
    assert total_s <= max(1.0, share) * COMPUTE_S + 1.5 * group_s
    assert sent.num_bytes == NUM_TOKENS * LAYOUT.token_bytes
    assert pace.most_at_once <= 2


def test_what_is_said_of_the_seconds_adds_up() -> None:
    sent, total_s, _ = timed_send(0.5)
    assert sent.compute_s == pytest.approx(COMPUTE_S, abs=0.02)
    assert sent.send_s == pytest.approx(0.5 * COMPUTE_S, abs=0.05)
    assert sent.tail_s == pytest.approx(0.5 * COMPUTE_S / NUM_GROUPS, abs=0.02)
    assert sent.tail_s == pytest.approx(total_s - sent.queue_s - sent.compute_s, abs=0.02)


def test_on_a_slow_lane_the_tail_is_all_that_could_not_leave_earlier() -> None:
    sent, _, _ = timed_send(3.0)
    assert sent.tail_s == pytest.approx(3.0 * COMPUTE_S - (1 - 1 / NUM_GROUPS) * COMPUTE_S, abs=0.1)


def test_one_group_is_the_serial_send() -> None:
    _, total_s, _ = timed_send(1.0, num_groups=1)
    assert total_s == pytest.approx(2 * COMPUTE_S, abs=0.05)


def test_a_prompt_in_chunks_leaves_chunk_by_chunk() -> None:
    sent, total_s, _ = timed_send(1.0, budget=64)
    assert total_s <= COMPUTE_S * (1 + 1.5 / NUM_GROUPS)
    assert sent.num_bytes == NUM_TOKENS * LAYOUT.token_bytes
