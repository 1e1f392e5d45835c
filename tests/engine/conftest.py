"""The synchronous half of an engine, driven by hand: a scheduler and a runner over a pool in this process."""

from array import array
from random import Random

import pytest

from callboard.actors.engine.scheduler import Emit, Released, Scheduler
from callboard.actors.engine.sequence import Sequence
from callboard.kv.tokens import pack_tokens


class LocalPool:
    """A pool's free list, and a prefix cache of whole prompts: the least that a scheduler needs of a KV manager."""

    def __init__(self, num_blocks, block_size, *, seed=0):
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.free = list(range(num_blocks))
        Random(seed).shuffle(self.free)
        self.cached = {}  # tokens of a run of full blocks -> their ids

    def admit(self, tokens, *, reuse=False):
        """Return (block_table, num_cached_tokens), or None when there is no room."""
        size = self.block_size
        shared = []
        while reuse and (block := self.cached.get(tuple(tokens[: (len(shared) + 1) * size]))) is not None:
            if len(tokens) < (len(shared) + 1) * size:
                break
            shared.append(block)
        needed = -(-len(tokens) // size) - len(shared)
        if needed > len(self.free):
            return None
        own = [self.free.pop() for _ in range(needed)]
        return array("i", shared + own).tobytes(), len(shared) * size

    def take_back(self, tokens, block_table, *, keep=False):
        for i, block in enumerate(array("i", block_table)):
            prefix = tuple(tokens[: (i + 1) * self.block_size])
            if block in self.cached.values():
                continue
            if keep and len(prefix) == (i + 1) * self.block_size and prefix not in self.cached:
                self.cached[prefix] = block
            else:
                self.free.append(block)


class LocalEngine:
    """Runs requests to their end, and checks integrity after every step."""

    def __init__(self, runner, *, num_blocks=64, seed=0, reuse=False, memory=None, **limits):
        settings = {"max_num_batched_tokens": 64, "max_num_seqs": 16, "max_model_len": 512, **limits}
        self.runner = runner
        self.layout = runner.layout
        self.scheduler = Scheduler(block_size=self.layout.block_size, **settings)
        self.pool = LocalPool(num_blocks, self.layout.block_size, seed=seed)
        self.reuse = reuse
        self.waiting = []
        self.outputs = {}
        self.finished = {}
        self.samples = {}
        self.num_steps = 0
        self.layers_done = []
        memory = memoryview(bytearray(self.layout.block_bytes * num_blocks)) if memory is None else memory
        runner.map_pool(memory, num_blocks)

    def submit(self, name, prompt, sampling):
        self.waiting.append(Sequence(name, prompt, sampling))
        self.outputs[name] = []

    def admit_waiting(self):
        while self.waiting and (place := self.pool.admit(self.waiting[0].tokens, reuse=self.reuse)):
            sequence = self.waiting.pop(0)
            sequence.place(*place)
            self.scheduler.add(sequence)

    def step(self):
        self.carry_out()
        slab = self.scheduler.slab
        if slab.wants:
            taken = [self.pool.free.pop() for _ in range(min(slab.wants, len(self.pool.free)))]
            slab.refill(taken)
            slab.is_exhausted = not taken
        if not slab.is_exhausted:
            self.admit_waiting()
        step = self.scheduler.schedule()
        self.scheduler.check_integrity()
        self.carry_out()
        if step.chunks:
            result = self.runner.run(step, lambda *layers: self.layers_done.append(layers))
            self.scheduler.apply(step, result)
            self.num_steps += 1
        self.scheduler.check_integrity()
        self.carry_out()
        return step

    def carry_out(self):
        for instruction in self.scheduler.take_instructions():
            if isinstance(instruction, Emit):
                name = instruction.sequence.sequence_id
                assert instruction.position == len(self.outputs[name])
                self.outputs[name].append(instruction.sample.token)
                self.samples.setdefault(name, []).append(instruction.sample)
            elif isinstance(instruction, Released):
                sequence = instruction.sequence
                in_place = sequence.tokens[: instruction.num_computed_tokens]
                self.pool.take_back(in_place, instruction.block_table, keep=self.reuse)
                if instruction.is_preempted:
                    self.waiting.insert(0, sequence)
                else:
                    self.finished[sequence.sequence_id] = sequence
        if not len(self.scheduler):
            self.pool.take_back([], self.scheduler.slab.give())

    def run(self, *, max_steps=3000):
        self.carry_out()
        while self.waiting or len(self.scheduler):
            self.step()
            max_steps -= 1
            assert max_steps, "no progress"
        assert len(self.pool.free) + len(set(self.pool.cached.values())) == self.pool.num_blocks
        return self.outputs


@pytest.fixture(scope="session")
def local_engine():
    return LocalEngine


@pytest.fixture(scope="session")
def packed():
    return pack_tokens
