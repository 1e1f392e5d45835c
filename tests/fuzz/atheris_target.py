"""Fuzzing that is led by coverage: ``PYTHONPATH=tests python -m fuzz.atheris_target -max_total_time=300``.

Needs ``pip install atheris``, which is not among the development tools. An input is an endpoint and a list of frames,
sent over an open link to the fleet of in_process.py; it is kept where it reaches new code of Callboard's. Mutations are
libFuzzer's, and half of the time those of mutator.py. Options are libFuzzer's.
"""

import asyncio
import logging
import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["callboard"]):
    from fuzz.in_process import FuzzError, FuzzLoop, World, fuzzed_fleet
    from fuzz.mutator import Mutator, decode, encode
    from fuzz.recorder import record

HONEST_EVERY = 2000
HEAD = 1
"""Bytes before the frames: which node they go to."""


class Target:
    """A fleet, and inputs for it."""

    def __init__(self) -> None:
        logging.getLogger("callboard").addHandler(logging.NullHandler())
        self.corpus = record()
        self._runner = asyncio.Runner(loop_factory=FuzzLoop)
        self._fleet = fuzzed_fleet(self.corpus, 0)
        self._world: World = self._runner.run(self._fleet.__aenter__())
        self._num_inputs = 0
        self._mutator = Mutator(random.Random(0), self.corpus)

    def take(self, data: bytes) -> None:
        """Send one input. Raises FuzzError."""
        self._runner.run(self._send(data))

    async def _send(self, data: bytes) -> None:
        world = self._world
        world.loop.num_passes = 0
        world.peer.used.clear()
        if len(data) > HEAD:
            endpoints = world.peer.endpoints
            world.peer.send_frames(endpoints[data[0] % len(endpoints)], data[HEAD:])
            await asyncio.sleep(0.002)
            world.peer.judge()
        self._num_inputs += 1
        if self._num_inputs % HONEST_EVERY == 0:
            await world.ask_honestly()
        world.check()

    def mutate(self, data: bytes, max_size: int, seed: int) -> bytes:
        """Return a changed input."""
        rng = random.Random(seed)
        if rng.random() < 0.5:
            try:
                tree = decode(data[HEAD:])
                if isinstance(tree, list):
                    self._mutator.rng = rng
                    self._mutator.mutate(tree)
                    return data[:HEAD] + bytes(encode(tree))[: max_size - HEAD]
            except (ValueError, RecursionError):
                pass
        return bytes(atheris.Mutate(data, max_size))

    def write_seeds(self, directory: Path) -> None:
        """Write every recorded frame as an input."""
        endpoints = self._world.peer.endpoints
        for kind, samples in self.corpus.items():
            for number, (endpoint, frame) in enumerate(samples):
                head = bytes([endpoints.index(endpoint) if endpoint in endpoints else 0])
                (directory / f"{kind.replace('/', '-')}-{number}").write_bytes(head + b"\x91" + frame)


def main() -> None:
    target = Target()
    with tempfile.TemporaryDirectory() as seeds:
        target.write_seeds(Path(seeds))

        def take(data: bytes) -> None:
            try:
                target.take(data)
            except FuzzError as error:
                raise RuntimeError(f"{error}; the input: {data!r}") from None

        atheris.Setup([*sys.argv, seeds, "-max_len=4096"], take, custom_mutator=target.mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
