"""One forward pass of a batch, as a value: what the scheduler hands to a runner, and what comes back.

A runner is anything of the shape of ``Runner``: a new one is a new file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from callboard.actors.model_config import ModelFacts
from callboard.actors.protocol import SamplingParams
from callboard.kv.layout import KvLayout
from callboard.kv.tokens import num_tokens


@dataclass(frozen=True, slots=True)
class Draw:
    """Which token to choose after a chunk: how, and for which output position."""

    sampling: SamplingParams
    position: int
    output: bytes = b""
    """The tokens before this position, int32, where penalties count them; else empty."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A chosen token, with its log-probability under the unscaled, unfiltered distribution."""

    token: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of one sequence's tokens whose KV is to be computed: all of its prompt, a part of it, or one decode."""

    sequence_id: str
    tokens: bytes
    """int32 token ids, never empty."""
    begin: int
    """Position of the first of them; the KV of everything before it is in place."""
    write_begin: int
    """KV before this position is in place already and is left alone, even where it is computed once more."""
    block_table: bytes
    """int32 block ids, covering ``[0, end)``."""
    draw: Draw | None = None
    """None: nothing is sampled."""
    is_kv_only: bool = False
    """Whether somebody waits for its KV layer by layer, rather than for a token."""

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.begin + num_tokens(self.tokens)


@dataclass(frozen=True, slots=True)
class Step:
    """The chunks of one forward pass, decodes (one token each) first."""

    chunks: tuple[Chunk, ...] = ()
    num_decodes: int = 0
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a runner made of a step: one Sample per chunk that draws, in order."""

    samples: tuple[Sample, ...]


OnLayers = Callable[[int, int], None]
"""Called with ``(layer_begin, layer_end)`` when the step's KV of those layers is in place; in the runner's thread."""


class Runner(Protocol):
    """What computes steps. Blocking: the actor calls it in a worker thread, one call at a time."""

    facts: ModelFacts
    layout: KvLayout

    def map_pool(self, memory: Any, num_blocks: int) -> None:
        """Use ``memory``, of ``layout.pool_shape(num_blocks)``, as the pool from now on.

        It is a ``PageStore.memory``: a buffer, or on a GPU an object with a CUDA array interface.
        """

    def unmap_pool(self) -> None:
        """Let go of the pool's memory."""

    def run(self, step: Step, on_layers: OnLayers) -> StepResult:
        """Compute a step's KV into the pool, and sample.

        If the step has kv-only chunks, ``on_layers`` is told, in order, which layers' KV is in place.
        """
