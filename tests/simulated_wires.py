"""Wires of a simulation: bytes take time, cables break, and processes are stopped and killed at either end."""

import asyncio
from collections.abc import Coroutine
from random import Random
from typing import Any

from callboard.bus import Clock
from callboard.bus.testing import current_process
from callboard.kv.lanes import Invitation, WireBroken

FRAGMENTS = 3
"""Into how many parts a message is cut, at most."""


class WireNetwork:
    """Makes the wires of every process: give it to a hub's exchange as ``wires``. A cable breaks with ``break_share``
    at each fragment."""

    def __init__(self, clock: Clock, rng: Random, *, delay_s: float = 1e-3, break_share: float = 0.0) -> None:
        self.clock = clock
        self.rng = rng
        self.delay_s = delay_s
        self.break_share = break_share
        self.num_messages = 0
        self.num_breaks = 0
        """Cables that broke by themselves."""
        self.cables: dict[str, _Cable] = {}
        """Those that somebody was invited to, by their address."""

    def __call__(self, host: str) -> "SimulatedWires":
        return SimulatedWires(self)

    async def delay(self) -> None:
        """Let some time pass, of whoever calls."""
        await self.clock.sleep(self.rng.uniform(0.0, 2 * self.delay_s))


class _Cable:
    """What connects a sender and a receiver: messages offered, buffers for them, and whether it is broken."""

    def __init__(self, network: WireNetwork, secret: bytes) -> None:
        self.network = network
        self.secret = secret
        self.is_broken = False
        self._offered: dict[int, tuple[memoryview, asyncio.Future[None]]] = {}
        self._changed: list[asyncio.Future[None]] = []

    def dies_with_process(self) -> None:
        """Break with the process that calls, as the kernel sees to it."""
        process = current_process()
        if process is not None:
            process.on_kill.append(self.snap)

    def snap(self) -> None:
        """Break. From here on no byte is read or written at either end."""
        self.is_broken = True
        for _, taken in self._offered.values():
            _wake(taken)
        self._wake_all()

    async def send(self, tag: int, data: memoryview) -> None:
        taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        await self.network.delay()
        if not self.is_broken:
            self._offered[tag] = (data, taken)
            self._wake_all()
            await taken
        if self.is_broken and (tag in self._offered or not taken.done()):
            raise WireBroken("the cable is broken")

    async def receive(self, tag: int, buffer: memoryview) -> None:
        network, done = self.network, 0
        while tag not in self._offered:
            if self.is_broken:
                await network.delay()
                raise WireBroken("the cable is broken")
            changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._changed.append(changed)
            await changed
        data, taken = self._offered[tag]
        is_too_long = len(data) > len(buffer)
        cuts = sorted(network.rng.randrange(len(data) + 1) for _ in range(FRAGMENTS - 1))
        for end in (*cuts, len(data)):
            await network.delay()
            if network.rng.random() < network.break_share:
                network.num_breaks += not self.is_broken
                self.snap()
            if self.is_broken:
                raise WireBroken("the cable is broken")
            if not is_too_long:
                buffer[done:end] = data[done:end]
            done = end
        network.num_messages += 1
        del self._offered[tag]
        _wake(taken)
        if is_too_long:
            raise WireBroken("the message is too long")

    def _wake_all(self) -> None:
        changed, self._changed = self._changed, []
        for future in changed:
            _wake(future)


class SimulatedWires:
    """The wires of one process (kv/lanes/wire.py)."""

    is_usable = True

    def __init__(self, network: WireNetwork) -> None:
        self._network = network
        self._ends: list[_End] = []

    async def invite(self) -> Invitation:
        network = self._network
        await network.delay()
        cable = _Cable(network, network.rng.randbytes(32))
        cable.dies_with_process()
        address = f"simulated:{len(network.cables)}"
        network.cables[address] = cable
        self._ends.append(_End(cable))
        return Invitation(address, cable.secret, self._ends[-1])

    async def connect(self, address: str, secret: bytes) -> "_End":
        await self._network.delay()
        cable = self._network.cables.get(address)
        if cable is None or cable.is_broken or cable.secret != secret:
            raise WireBroken(f"nobody at {address} lets us in")
        cable.secret = b""  # It is good for one.
        cable.dies_with_process()
        self._ends.append(_End(cable))
        return self._ends[-1]

    def new_tag(self) -> int:
        return self._network.rng.getrandbits(64)

    async def close(self) -> None:
        for end in self._ends:
            end.close()
        for end in self._ends:
            await end.ended()


class _End:
    """Either end of a cable."""

    def __init__(self, cable: _Cable) -> None:
        self._cable = cable
        self._is_closed = False
        self._under_way: dict[asyncio.Future[None], None] = {}

    async def send(self, tag: int, data: memoryview) -> None:
        await self._see_out(self._cable.send(tag, data))

    async def receive(self, tag: int, buffer: memoryview) -> None:
        await self._see_out(self._cable.receive(tag, buffer))

    async def ended(self) -> None:
        """Wait until nothing is read or written any more."""
        while self._under_way:
            await asyncio.wait(self._under_way)

    async def _see_out(self, transfer: Coroutine[Any, Any, None]) -> None:
        if self._is_closed:  # Here, which is known at once: as a real wire says it.
            transfer.close()
            raise WireBroken("it is closed")
        self._under_way[done := asyncio.get_running_loop().create_future()] = None
        try:
            await transfer
        finally:
            del self._under_way[done]
            _wake(done)

    def close(self) -> None:
        self._is_closed = True
        self._cable.snap()


def _wake(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
