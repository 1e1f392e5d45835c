"""A runner without a model: KV and tokens are hashes, and a step's duration comes from a cost model. No torch.

What it computes is in hashed_model.py; here it is done on the slots of a real pool, layer by layer as a forward pass
would: each layer's KV is written, and read together with all KV before it, when its share of the step's time is over.
"""

from collections.abc import Awaitable, Callable, Iterable, Iterator

import msgspec
import numpy as np
from numpy.typing import NDArray

from callboard.actors.model_config import ModelFacts, layout_of
from callboard.actors.protocol import SamplingParams
from callboard.kv.layout import KvLayout
from callboard.kv.tokens import unpack_tokens

from .hashed_model import ENDS, Words, attend, embed, generate, kv_words, token_of, weights
from .layer_groups import layer_groups
from .step import Chunk, OnLayers, Sample, Step, StepResult

WORD = 8
Sleep = Callable[[float], Awaitable[None]]


class Simulation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The shape of a model that does not exist, and what its steps cost.

    A step takes ``seconds_per_step`` (weights read once, kernels launched, whatever the batch), and more for each
    prefill token, each decoding sequence, and each token that a token attends to: linear pieces, as in the performance
    model of Splitwise (arXiv 2311.18677), and a term for attention.
    """

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
    seconds_per_attended_token: float = 0.0
    """Added for each pair of a token that is computed and one that it attends to."""
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

    def step_seconds(self, step: Step) -> float:
        """Return how long a step takes."""
        num_prefill = step.num_tokens - step.num_decodes
        seconds = self.seconds_per_step + num_prefill * self.seconds_per_prefill_token
        seconds += step.num_decodes * self.seconds_per_decode
        if self.seconds_per_attended_token:
            pairs = sum((chunk.end - chunk.begin) * (chunk.begin + chunk.end + 1) // 2 for chunk in step.chunks)
            seconds += pairs * self.seconds_per_attended_token
        return seconds


LLAMA2_70B_ON_4_H100 = Simulation(
    seconds_per_step=29.2e-3,
    seconds_per_prefill_token=71.8e-6,
    seconds_per_decode=0.309e-3,
    seconds_per_attended_token=11.2e-9,
)
"""The costs of Llama-2-70B on four H100, fitted (least squares of relative errors) to the medians of splitwise-sim's
``data/perf_model.csv`` (MIT): within 14% from 512 prompt tokens on, and up to 22% low below; decodes within 6%."""


class SimulatedRunner:
    """Computes steps over a real pool as a Runner does, in microseconds. ``run_timed`` takes their time as well."""

    def __init__(
        self, simulation: Simulation, *, dtype: str = "float32", block_size: int = 16, num_layer_groups: int = 4
    ) -> None:
        self.simulation = simulation
        self.facts = simulation.facts
        self.layout: KvLayout = layout_of(self.facts, block_size, dtype)
        if self.layout.slot_bytes < WORD:
            raise ValueError(f"a simulated slot needs {WORD} bytes, and this layout gives it {self.layout.slot_bytes}")
        self._groups = layer_groups(self.layout.num_layers, num_layer_groups)
        self._words: Words | None = None
        self._weights = weights(0, 64)

    def map_pool(self, memory: memoryview, num_blocks: int) -> None:
        layout, width = self.layout, self.layout.slot_bytes
        num_slots = num_blocks * layout.block_size
        # The first and the last word of every slot, which in a small slot are the same: [layers, 2, ENDS, slots].
        shape = (layout.num_layers, 2, ENDS, num_slots)
        strides = (2 * num_slots * width, num_slots * width, width - WORD if width >= ENDS * WORD else 0, width)
        self._words = np.ndarray(shape, dtype=np.uint64, buffer=memory, strides=strides)

    def unmap_pool(self) -> None:
        self._words = None

    def run(self, step: Step, on_layers: OnLayers) -> StepResult:
        forward = _Forward(step, self)
        for layers in self._parts(step):
            forward.compute(range(*layers))
            on_layers(*layers)
        return forward.result()

    async def run_timed(self, step: Step, on_layers: OnLayers, sleep: Sleep) -> StepResult:
        """Do as ``run`` does in the time that the step takes, each group of layers at the end of its share."""
        forward, seconds = _Forward(step, self), self.simulation.step_seconds(step)
        for begin, end in self._parts(step):
            await sleep(seconds * (end - begin) / self.layout.num_layers)
            forward.compute(range(begin, end))
            on_layers(begin, end)
        return forward.result()

    def _parts(self, step: Step) -> Iterable[tuple[int, int]]:
        """Return the groups of layers that somebody waits for."""
        is_watched = any(chunk.is_kv_only for chunk in step.chunks)
        return self._groups.values() if is_watched else ((0, self.layout.num_layers),)

    def words(self) -> Words:
        """Return the words of the pool: [layers, 2 (keys, values), ENDS, slots]."""
        assert self._words is not None, "no pool is mapped"
        return self._words

    def weights(self, num_positions: int) -> Words:
        """Return the weights of at least that many positions."""
        if self._weights.shape[2] < num_positions:
            self._weights = weights(0, 2 * num_positions)
        return self._weights


class _Forward:
    """One step on its way through the layers, all of its chunks at once."""

    def __init__(self, step: Step, runner: SimulatedRunner) -> None:
        # Hot: once per step; a dozen operations of numpy a layer, however many sequences there are.
        self._step = step
        self._vocab_size = runner.facts.vocab_size
        self._words = runner.words()
        block_size = runner.layout.block_size
        slots, places, tokens, positions, rows = ([] for _ in range(5))
        begins, ends, writes = [], [], []
        base = num_rows = 0
        for chunk in step.chunks:
            slots.append(_slots(chunk, block_size))
            places.append(np.arange(chunk.end))
            tokens += unpack_tokens(chunk.tokens)
            own = np.arange(chunk.begin, chunk.end)
            positions.append(own)
            begins.append(np.full(len(own), base))
            ends.append(base + own + 1)
            skipped = chunk.write_begin - chunk.begin
            rows.append(np.arange(num_rows + skipped, num_rows + len(own)))
            writes.append(slots[-1][chunk.begin + skipped :])
            base, num_rows = base + chunk.end, num_rows + len(own)
        self._slots, self._rows, self._writes = _join(slots), _join(rows), _join(writes)
        self._begins, self._ends = _join(begins), _join(ends)
        self._last = np.cumsum([chunk.end - chunk.begin for chunk in step.chunks]) - 1
        placed = _join(places)
        known = runner.weights(max((chunk.end for chunk in step.chunks), default=0))
        self._weights = [(half, end, known[half, end][placed]) for half in (0, 1) for end in range(ENDS)]
        self._states = embed(np.array(tokens, dtype=np.uint64), _join(positions).astype(np.uint64))

    def compute(self, layers: range) -> None:
        """Write these layers' KV, and attend to all that the sequences' slots hold now."""
        for layer in layers:
            words = self._words[layer]
            words[:, :, self._writes] = kv_words(self._states[self._rows], layer)[:, None, :]
            seen = np.zeros(len(self._slots) + 1, dtype=np.uint64)
            weighted = seen[1:]
            for half, end, weight in self._weights:  # One by one: numpy is slow to gather along several axes.
                weighted += words[half, end][self._slots] * weight
            np.cumsum(weighted, out=weighted)
            self._states = attend(self._states, seen[self._ends] - seen[self._begins])

    def result(self) -> StepResult:
        """Return what is sampled after the last layer."""
        return StepResult(tuple(self._samples()))

    def _samples(self) -> Iterator[Sample]:
        for chunk, state in zip(self._step.chunks, self._states[self._last].tolist(), strict=True):
            if chunk.draw is not None:
                yield Sample(token_of(state, chunk.draw, self._vocab_size), 0.0)


def simulated_tokens(
    prompt: Iterable[int],
    num_tokens: int,
    simulation: Simulation | None = None,
    sampling: SamplingParams | None = None,
) -> list[int]:
    """Return the first ``num_tokens`` a simulated engine generates after ``prompt``, end tokens not observed."""
    simulation = simulation or Simulation()
    return generate(
        prompt,
        num_tokens,
        sampling or SamplingParams(),
        num_layers=simulation.num_layers,
        vocab_size=simulation.vocab_size,
    )


def _slots(chunk: Chunk, block_size: int) -> NDArray[np.int64]:
    """Return the slots of the tokens ``[0, end)`` of a chunk's sequence."""
    table = np.frombuffer(chunk.block_table, dtype=np.int32).astype(np.int64)
    positions = np.arange(chunk.end)
    slots: NDArray[np.int64] = table[positions // block_size] * block_size + positions % block_size
    return slots


def _join(parts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
