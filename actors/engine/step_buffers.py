"""The tensors of a step's metadata: allocated once, and where the model reads them."""

from array import array

import torch
from torch import Tensor

from callboard.kv.tokens import unpack_tokens

from .model import PagedContext
from .step import Chunk, Draw, Step


class StepBuffers:
    """What a step is told besides its weights and its pool; a step uses the front of each tensor.

    They are written on the CPU. For a GPU each has a twin there, and the front of it is copied over from pinned memory
    without waiting: no step may be filled in before the GPU is done with the last one.
    """

    def __init__(self, max_tokens: int, max_seqs: int, max_blocks: int, device: torch.device) -> None:
        here = _Tensors(max_tokens, max_seqs, max_blocks, torch.device("cpu"), is_pinned=device.type == "cuda")
        self._here = here
        self._there = here if device.type == "cpu" else _Tensors(max_tokens, max_seqs, max_blocks, device)
        self._split = torch.zeros(3, dtype=torch.int64)
        self.ids, self.positions, self.rows = self._there.ids, self._there.positions, self._there.rows

    def fill(self, step: Step, block_size: int, context: PagedContext) -> list[Draw]:
        """Write a step's metadata into the buffers, and show it to attention. Returns its draws."""
        here, there = self._here, self._there
        ids, positions, slots, lengths, starts, rows = (array("q") for _ in range(6))
        draws: list[Draw] = []
        for i, chunk in enumerate(step.chunks):
            table = array("i", chunk.block_table)
            num_blocks = (chunk.end - 1) // block_size + 1
            here.block_tables[i, :num_blocks] = torch.frombuffer(table, dtype=torch.int32, count=num_blocks)
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
        targets = (here.ids[0], here.positions[0], here.slots, here.lens[0], here.lens[1], here.rows)
        for target, values in zip(targets, (ids, positions, slots, lengths, starts, rows), strict=True):
            target[: len(values)] = torch.frombuffer(values, dtype=torch.int64)
        num_unwritten = sum(max(0, chunk.write_begin - chunk.begin) for chunk in step.chunks)
        for i, number in enumerate((step.num_decodes, len(step.chunks), num_unwritten)):
            self._split[i] = number
        if there is not here:
            there.follow(here, len(ids), len(step.chunks), len(rows))
            context.host_lens = here.lens
        context.slots, context.block_tables = there.slots[: step.num_tokens], there.block_tables
        context.context_lens, context.query_start, context.split = there.lens[0], there.lens[1], self._split
        return draws


class _Tensors:
    def __init__(
        self, max_tokens: int, max_seqs: int, max_blocks: int, device: torch.device, *, is_pinned: bool = False
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device, pin_memory=is_pinned)

        self.ids = zeros(1, max_tokens)
        self.positions = zeros(1, max_tokens)
        self.slots = zeros(max_tokens)
        self.block_tables = zeros(max_seqs, max_blocks, dtype=torch.int32)
        self.lens = zeros(2, max_seqs + 1)
        """Tokens of each sequence up to its last query; and the row at which its queries begin."""
        self.rows = zeros(max_seqs)
        """The row of each chunk that draws: its last token's."""

    def follow(self, other: "_Tensors", num_tokens: int, num_sequences: int, num_rows: int) -> None:
        """Copy the fronts of another's over; returns before they have arrived."""
        self.ids[:, :num_tokens].copy_(other.ids[:, :num_tokens], non_blocking=True)
        self.positions[:, :num_tokens].copy_(other.positions[:, :num_tokens], non_blocking=True)
        self.slots[:num_tokens].copy_(other.slots[:num_tokens], non_blocking=True)
        self.block_tables[:num_sequences].copy_(other.block_tables[:num_sequences], non_blocking=True)
        self.lens.copy_(other.lens, non_blocking=True)
        self.rows[:num_rows].copy_(other.rows[:num_rows], non_blocking=True)


def _slots(chunk: Chunk, table: "array[int]", block_size: int) -> list[int]:
    return [
        table[p // block_size] * block_size + p % block_size if p >= chunk.write_begin else -1
        for p in range(chunk.begin, chunk.end)
    ]
