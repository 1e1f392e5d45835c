"""A runner without a model: KV and tokens are hashes, and a step's duration comes from a cost model. No torch.

What it writes for a token depends on the token, its position and the KV before it, and what it samples depends on the
KV of every slot the sequence reads: one wrong, missing or stale slot changes the tokens, exactly and at once.
"""

from collections.abc import Iterable

import msgspec
import numpy as np
from numpy.typing import NDArray

from callboard.actors.model_config import ModelFacts, layout_of
from callboard.actors.protocol import SamplingParams
from callboard.kv.layout import KvLayout
from callboard.kv.tokens import unpack_tokens

from .layer_groups import layer_groups
from .step import Chunk, Draw, OnLayers, Sample, Step, StepResult

WORD = 8
MASK = (1 << 64) - 1


class Simulation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The shape of a model that does not exist, and what its steps cost."""

    num_layers: int = 4
    num_kv_heads: int = 1
    head_dim: int = 8
    vocab_size: int = 1000
    max_model_len: int = 8192
    eos_token_id: int | None = None
    seconds_per_step: float = 0.0
    seconds_per_prefill_token: float = 0.0
    seconds_per_decode: float = 0.0
    """Added for each decoding sequence of a step."""
    load_s: float = 0.0

    @property
    def facts(self) -> ModelFacts:
        """What a model directory would say."""
        eos = () if self.eos_token_id is None else (self.eos_token_id,)
        return ModelFacts(self.num_layers, self.num_kv_heads, self.head_dim, self.max_model_len, self.vocab_size, eos)

    def shaped_like(self, facts: ModelFacts) -> "Simulation":
        """Return the same costs for a model of this shape."""
        return msgspec.structs.replace(
            self,
            num_layers=facts.num_layers,
            num_kv_heads=facts.num_kv_heads,
            head_dim=facts.head_dim,
            vocab_size=facts.vocab_size,
            max_model_len=facts.max_model_len,
        )


class SimulatedRunner:
    """Computes steps over a real pool as a Runner does, in microseconds; ``run`` returns the time it stands for."""

    def __init__(
        self, simulation: Simulation, *, dtype: str = "float32", block_size: int = 16, num_layer_groups: int = 4
    ) -> None:
        self.simulation = simulation
        self.facts = simulation.facts
        self.layout: KvLayout = layout_of(self.facts, block_size, dtype)
        if self.layout.slot_bytes < WORD:
            raise ValueError(f"a simulated slot needs {WORD} bytes, and this layout gives it {self.layout.slot_bytes}")
        self._groups = layer_groups(self.layout.num_layers, num_layer_groups)
        self._words: NDArray[np.uint64] | None = None

    def map_pool(self, memory: memoryview, num_blocks: int) -> None:
        layout = self.layout
        shape = (layout.num_layers * 2, num_blocks * layout.block_size, layout.slot_bytes)
        pool = np.frombuffer(memory, dtype=np.uint8, count=shape[0] * shape[1] * shape[2]).reshape(shape)
        self._words = pool[:, :, :WORD].view(np.uint64)[:, :, 0]

    def unmap_pool(self) -> None:
        self._words = None

    def run(self, step: Step, on_layers: OnLayers) -> StepResult:
        assert self._words is not None, "no pool is mapped"
        samples = []
        for chunk in step.chunks:
            slots = _slots(chunk, self.layout.block_size)
            self._write(chunk, slots, self._words)
            if chunk.draw is not None:
                token = _draw(self._words[:, slots], chunk.draw, self.facts.vocab_size)
                samples.append(Sample(token, 0.0))
        if any(chunk.is_kv_only for chunk in step.chunks):
            for layers in self._groups.values():
                on_layers(*layers)
        return StepResult(tuple(samples), self._duration_s(step))

    def _write(self, chunk: Chunk, slots: NDArray[np.int64], words: NDArray[np.uint64]) -> None:
        state = int(words[0, slots[chunk.begin - 1]]) if chunk.begin else 0
        states = _states(unpack_tokens(chunk.tokens), chunk.begin, state)
        first = chunk.write_begin - chunk.begin
        if first < len(states):
            written = np.array(states[first:], dtype=np.uint64)
            words[:, slots[chunk.write_begin :]] = _planes(written, words.shape[0])

    def _duration_s(self, step: Step) -> float:
        costs = self.simulation
        prefill = (step.num_tokens - step.num_decodes) * costs.seconds_per_prefill_token
        return costs.seconds_per_step + prefill + step.num_decodes * costs.seconds_per_decode


def simulated_tokens(
    prompt: Iterable[int],
    num_tokens: int,
    simulation: Simulation | None = None,
    sampling: SamplingParams | None = None,
) -> list[int]:
    """Return the first ``num_tokens`` a simulated engine generates after ``prompt``, end tokens not observed."""
    simulation = simulation or Simulation()
    sampling = sampling or SamplingParams()
    tokens = list(prompt)
    states = _states(tokens, 0, 0)
    generated: list[int] = []
    for position in range(num_tokens):
        planes = _planes(np.array(states, dtype=np.uint64), 2 * simulation.num_layers)
        token = _draw(planes, Draw(sampling, position), simulation.vocab_size)
        generated.append(token)
        states += _states([token], len(states), states[-1])
    return generated


def _states(tokens: list[int], begin: int, state: int) -> list[int]:
    """Return each token's KV as a hash of the token, its position and the KV before it."""
    states = []
    for position, token in enumerate(tokens, begin):
        state = _mix(state ^ _mix((position << 32) ^ token ^ 0x5851F42D4C957F2D))
        states.append(state)
    return states


def _planes(states: NDArray[np.uint64], num_planes: int) -> NDArray[np.uint64]:
    """Return the words of all layers' keys and values [num_planes, tokens]: the first plane is the state itself."""
    shifts = np.arange(num_planes, dtype=np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15)
    return states[None, :] ^ shifts


def _draw(words: NDArray[np.uint64], draw: Draw, vocab_size: int) -> int:
    """Return a token that depends on every word read, on where it stood, and on the noise's coordinates."""
    num_planes, context = words.shape
    odd = np.arange(1, 2 * num_planes * context, 2, dtype=np.uint64).reshape(num_planes, context)
    digest = int((words * odd).sum(dtype=np.uint64))
    if draw.sampling.temperature > 0:
        digest ^= _mix(_mix(draw.sampling.seed) ^ (draw.sampling.index << 32) ^ draw.position)
    return _mix(digest ^ context) % vocab_size


def _slots(chunk: Chunk, block_size: int) -> NDArray[np.int64]:
    """Return the slots of the tokens ``[0, end)`` of a chunk's sequence."""
    table = np.frombuffer(chunk.block_table, dtype=np.int32).astype(np.int64)
    positions = np.arange(chunk.end)
    slots: NDArray[np.int64] = table[positions // block_size] * block_size + positions % block_size
    return slots


def _mix(x: int) -> int:
    """Scramble 64 bits one to one (the finalizer of SplitMix64; sampling.py names the source)."""
    x &= MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)
