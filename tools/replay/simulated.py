"""Replaying in a simulation."""

from collections.abc import Callable, Sequence

import numpy as np

from callboard.tools.errors import CliError
from callboard.tools.machine import available_memory
from callboard.tools.trace.event import Event
from callboard.tools.units import format_size

from .asking import Asked, Asking, Show
from .costs import Costs
from .outcomes import Outcome, Outcomes
from .recorded import SAFE_VOCAB, HashedTokens, RecordedRequest
from .shape import Shape
from .world import LAYOUT, World, run_world

MOST_TOKEN = 1 << 24
CLIENT = "replay-client"


def vocab_size_of(requests: Sequence[RecordedRequest]) -> int:
    """Return a vocabulary that has all tokens of all prompts."""
    most = SAFE_VOCAB
    for request in requests:
        if not isinstance(request.prompt, HashedTokens) and request.prompt:
            most = max(most, int(np.frombuffer(request.prompt, dtype="<i4").max()))
    return min(most, MOST_TOKEN) + 1


def _client(requests: Sequence[RecordedRequest], shape: Shape) -> str:
    """Return the node that asks: the router's own, where the frontend was on that, or one by itself."""
    nodes = {router.node for router in shape.routers}
    num_near = sum(request.asked_at in nodes for request in requests)
    return shape.routers[0].node if 2 * num_near >= len(requests) else CLIENT


def check_memory(shape: Shape) -> None:
    """Raise CliError if the simulated pools take more memory than there is."""
    num_blocks = sum(manager.num_blocks for manager in shape.managers)
    needed, free = num_blocks * shape.block_size * LAYOUT.token_bytes, available_memory()
    if needed > free:
        sizes = f"{format_size(needed)} to simulate, and {format_size(free)} are free"
        raise CliError(f"the fleet's {num_blocks:,} blocks take {sizes}")


def simulate(
    requests: Sequence[RecordedRequest],
    shape: Shape,
    costs: Costs,
    *,
    seed: int,
    speed: float,
    show: Show,
    tap: Callable[[Event], None] | None = None,
) -> tuple[dict[str, Outcome], Asked]:
    """Run the requests in a simulated fleet; return what came of each, by id, and how the asking went."""
    check_memory(shape)
    outcomes = Outcomes()

    def follow(event: Event) -> None:
        outcomes.add(event)
        if tap is not None:
            tap(event)

    async def main() -> tuple[Asked, float]:
        world = World(
            shape, costs, seed=seed, vocab_size=vocab_size_of(requests), client=_client(requests, shape), follow=follow
        )
        async with world:
            asking = Asking(world.client, world.router, lambda request: request.id, speed=speed, show=show)
            asked = await asking.run(requests)
        if world.crashes:
            raise CliError(f"the simulated fleet did not hold: {world.crashes[0]}")
        return asked, world.byte_scale

    asked, byte_scale = run_world(main)
    done = outcomes.finish()
    for outcome in done.values():
        outcome.num_bytes = round(outcome.num_bytes * byte_scale)
    return done, asked
