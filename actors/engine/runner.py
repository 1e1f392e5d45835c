"""Running steps through a transformers model over the mapped pool."""

from array import array
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from callboard.actors.model_config import layout_of, read_model_config
from callboard.kv.tokens import unpack_tokens

from .layer_groups import layer_groups
from .model import PagedContext, load_model
from .sampling import sample
from .step import Chunk, Draw, OnLayers, Step, StepResult


class TransformersRunner:
    """A Hugging Face causal LM on this machine's CPU. All chunks of a step go flattened through one forward."""

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: str = "float32",
        block_size: int = 16,
        max_num_batched_tokens: int = 512,
        max_num_seqs: int = 64,
        num_layer_groups: int = 4,
        num_threads: int | None = None,
    ) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self.facts = read_model_config(path)
        self.layout = layout_of(self.facts, block_size, dtype)
        self._model, self._context = load_model(path, dtype)
        self._groups = layer_groups(self.layout.num_layers, num_layer_groups)
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_seqs = max_num_seqs
        self._buffers: StepBuffers | None = None

    def map_pool(self, memory: memoryview, num_blocks: int) -> None:
        flat = torch.frombuffer(memory, dtype=getattr(torch, self.layout.dtype))
        shape = self.layout.pool_shape(num_blocks)
        self._context.pool = flat[: torch.Size(shape).numel()].view(shape)
        longest = min(self.facts.max_model_len, num_blocks * self.layout.block_size)
        max_blocks = -(-longest // self.layout.block_size) + 1
        self._buffers = StepBuffers(self._max_num_batched_tokens, self._max_num_seqs, max_blocks)

    def unmap_pool(self) -> None:
        self._context.pool = self._buffers = None

    @torch.inference_mode()
    def run(self, step: Step, on_layers: OnLayers) -> StepResult:
        assert self._buffers is not None, "no pool is mapped"
        draws = self._buffers.fill(step, self.layout.block_size, self._context)
        is_watched = any(chunk.is_kv_only for chunk in step.chunks)
        self._context.on_layer = _by_group(self._groups, on_layers) if is_watched else None
        logits = forward(self._model, self._buffers, step.num_tokens, len(draws))
        if not draws:
            return StepResult(())
        return StepResult(tuple(sample(logits[0], draws)))


class StepBuffers:
    """The tensors of a step's metadata, allocated once; a step uses the front of each."""

    def __init__(self, max_tokens: int, max_seqs: int, max_blocks: int) -> None:
        self.ids = torch.zeros(1, max_tokens, dtype=torch.int64)
        self.positions = torch.zeros(1, max_tokens, dtype=torch.int64)
        self.slots = torch.zeros(max_tokens, dtype=torch.int64)
        self.block_tables = torch.zeros(max_seqs, max_blocks, dtype=torch.int32)
        self.context_lens = torch.zeros(max_seqs, dtype=torch.int64)
        self.query_start = torch.zeros(max_seqs + 1, dtype=torch.int64)
        self.split = torch.zeros(2, dtype=torch.int64)
        self.rows = torch.zeros(max_seqs, dtype=torch.int64)
        """The row of each chunk that draws: its last token's."""

    def fill(self, step: Step, block_size: int, context: PagedContext) -> list[Draw]:
        """Write a step's metadata into the buffers, and show it to attention. Returns its draws."""
        ids, positions, slots, lengths, starts, rows = (array("q") for _ in range(6))
        draws: list[Draw] = []
        for i, chunk in enumerate(step.chunks):
            table = array("i", chunk.block_table)
            num_blocks = (chunk.end - 1) // block_size + 1
            self.block_tables[i, :num_blocks] = torch.frombuffer(table, dtype=torch.int32, count=num_blocks)
            starts.append(len(ids))
            ids.extend(unpack_tokens(chunk.tokens))
            positions.extend(range(chunk.begin, chunk.end))
            slots.extend(_slots(chunk, table, block_size))
            lengths.append(chunk.end)
            if chunk.draw is not None:
                draws.append(chunk.draw)
                rows.append(len(ids) - 1)
        starts.append(len(ids))
        rows = rows or array("q", [0])
        targets = (self.ids[0], self.positions[0], self.slots, self.context_lens, self.query_start, self.rows)
        for target, values in zip(targets, (ids, positions, slots, lengths, starts, rows), strict=True):
            target[: len(values)] = torch.frombuffer(values, dtype=torch.int64)
        self.split[0], self.split[1] = step.num_decodes, len(step.chunks)
        context.slots, context.block_tables = self.slots[: step.num_tokens], self.block_tables
        context.context_lens, context.query_start, context.split = self.context_lens, self.query_start, self.split
        return draws


def forward(model: nn.Module, buffers: StepBuffers, num_tokens: int, num_draws: int) -> Tensor:
    """Return the logits [1, max(1, num_draws), vocab] of a step."""
    logits: Tensor = model(
        input_ids=buffers.ids[:, :num_tokens],
        position_ids=buffers.positions[:, :num_tokens],
        use_cache=False,
        logits_to_keep=buffers.rows[: max(1, num_draws)],
    ).logits
    return logits


def _by_group(groups: dict[int, tuple[int, int]], on_layers: OnLayers) -> Callable[[int], None]:
    def on_layer(layer: int) -> None:
        if layer in groups:
            on_layers(*groups[layer])

    return on_layer


def _slots(chunk: Chunk, table: "array[int]", block_size: int) -> list[int]:
    return [
        table[p // block_size] * block_size + p % block_size if p >= chunk.write_begin else -1
        for p in range(chunk.begin, chunk.end)
    ]
