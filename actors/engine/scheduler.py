"""Which tokens go through the model next. Synchronous and free of IO: the actor around it moves, this decides.

Continuous batching with chunked prefill: every step takes one token of each decoding sequence, and then as much of
the waiting prompts as the token budget allows, so a long prompt never stalls decodes. What is to be done about a step's
outcome (a token to emit, blocks to give back) is left in ``take_instructions()``.
"""

from bisect import insort
from collections import Counter
from dataclasses import dataclass

from callboard.actors.protocol import FinishReason

from .counts import Counts
from .sequence import Sequence
from .slab import Slab
from .step import Chunk, Sample, Step, StepResult


@dataclass(frozen=True, slots=True)
class Emit:
    """Send a token to whoever asked for the sequence."""

    sequence: Sequence
    sample: Sample
    position: int
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Prefilled:
    """All of the sequence's tokens are in place for the first time: its full blocks may be shared."""

    sequence: Sequence


@dataclass(frozen=True, slots=True)
class Released:
    """The sequence left the scheduler with its blocks: they go back, with the KV of ``tokens[:num_computed_tokens]``.

    A preempted one comes back: admit it again, with all its tokens.
    """

    sequence: Sequence
    block_table: bytes
    num_computed_tokens: int
    is_preempted: bool = False


Instruction = Emit | Prefilled | Released


class Scheduler:
    """The sequences that hold blocks, in order of arrival, and the slab they grow from.

    One step at a time: ``schedule()``, run it, ``apply()``. Between the two, aborted sequences stay, because the step
    may still write their blocks.
    """

    def __init__(
        self,
        *,
        block_size: int,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
        eos_token_ids: tuple[int, ...] = (),
    ) -> None:
        self.block_size = block_size
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.eos_token_ids = frozenset(eos_token_ids)
        self.slab = Slab()
        self.counts = Counts()
        self._sequences: dict[str, Sequence] = {}
        self._order: list[Sequence] = []
        self._num_arrived = 0
        self._in_flight: Step | None = None
        self._instructions: list[Instruction] = []

    # ---- what comes in -------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Take in a sequence that has its blocks; one that was preempted keeps its rank."""
        assert sequence.sequence_id not in self._sequences, sequence
        assert len(sequence.block_table) * self.block_size >= len(sequence.tokens), sequence
        assert sequence.num_uncomputed_tokens > 0, sequence
        if sequence.arrival is None:
            sequence.arrival = self._num_arrived
            self._num_arrived += 1
        self._sequences[sequence.sequence_id] = sequence
        insort(self._order, sequence, key=_arrival)
        self._size_slab()

    def abort(self, sequence_id: str) -> None:
        """End a sequence: at once, or after the step in flight if it is part of that. Unknown ones are ignored."""
        sequence = self._sequences.get(sequence_id)
        if sequence is None:
            return
        sequence.is_aborted = True
        if not self._is_in_flight(sequence_id):
            self._release(sequence)

    def drop_all(self) -> list[Sequence]:
        """Forget everything, the slab and the step in flight included, and give nothing back: the pool is gone."""
        dropped, self._order = self._order, []
        self._sequences.clear()
        self._instructions.clear()
        self._in_flight = None
        self.slab.clear()
        self._size_slab()
        return dropped

    # ---- steps ---------------------------------------------------------------------------------------------------

    def schedule(self) -> Step:
        """Return the next step, which is empty when nothing can be computed now; it may preempt one sequence."""
        assert self._in_flight is None, "one step at a time"
        self._make_room()
        decodes: list[Chunk] = []
        prefills: list[Chunk] = []
        budget = self.max_num_batched_tokens
        # One place is a prompt's: else a full house of decodes would keep out what other engines wait for.
        is_prompt_waiting = any(not sequence.is_decoding for sequence in self._order)
        most_decodes = max(1, min(self.max_num_seqs, budget) - is_prompt_waiting)
        for sequence in self._order:
            if len(decodes) == most_decodes:
                break
            if sequence.is_decoding and not sequence.is_idle and self._grow(sequence):
                decodes.append(sequence.next_chunk(1))
                budget -= 1
        for sequence in self._order:
            if len(decodes) + len(prefills) == self.max_num_seqs or not budget:
                break
            if not sequence.is_decoding:
                chunk = sequence.next_chunk(min(budget, sequence.num_uncomputed_tokens))
                budget -= chunk.end - chunk.begin
                # A prompt's one last token looks like a decode to the model, and is batched as one.
                (decodes if chunk.end - chunk.begin == 1 else prefills).append(chunk)
        step = Step((*decodes, *prefills), len(decodes), self.max_num_batched_tokens - budget)
        self._in_flight = step if step.chunks else None
        return step

    def apply(self, step: Step, result: StepResult) -> None:
        """Take in what a step brought: tokens, finished sequences, and the aborts that waited for its end."""
        if step is not self._in_flight:
            return  # drop_all() came in between
        self._in_flight = None
        samples = iter(result.samples)
        for chunk in step.chunks:
            sample = next(samples) if chunk.draw else None
            sequence = self._sequences[chunk.sequence_id]
            self.counts.num_computed_tokens += sequence.advance(chunk)
            if sequence.is_aborted:
                self._release(sequence)
            elif sample is not None:
                self._emit(sequence, sample)
            elif not sequence.num_uncomputed_tokens:
                self._release(sequence)  # kv-only, and complete

    def take_instructions(self) -> list[Instruction]:
        """Return what is to be done, in order, and forget it."""
        taken, self._instructions = self._instructions, []
        return taken

    # ---- questions -----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._order)

    @property
    def num_generating(self) -> int:
        """Sequences that sample."""
        return sum(not sequence.is_kv_only for sequence in self._order)

    @property
    def num_decoding(self) -> int:
        """Sequences that take one token of every step."""
        return sum(sequence.is_decoding for sequence in self._order)

    @property
    def is_short(self) -> bool:
        """Whether somebody lacks a block that the slab does not have."""
        if len(self.slab):
            return False
        return any(s.is_decoding and not s.is_idle and self._lacks_block(s) for s in self._order)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens still to go through the model before every sequence decodes."""
        return sum(sequence.num_uncomputed_tokens for sequence in self._order if not sequence.is_decoding)

    def check_integrity(self) -> None:
        """Raise AssertionError unless no block can be written by two sequences and all counts agree."""
        assert sorted(self._sequences) == sorted(sequence.sequence_id for sequence in self._order)
        assert [_arrival(s) for s in self._order] == sorted(_arrival(s) for s in self._order)
        writable = Counter(self.slab.blocks)
        for sequence in self._order:
            assert 0 <= sequence.num_computed_tokens <= len(sequence.tokens) <= self.max_model_len, sequence
            assert sequence.num_computed_tokens <= len(sequence.block_table) * self.block_size, sequence
            writable.update(sequence.block_table[sequence.num_cached_tokens // self.block_size :])
            assert not set(sequence.block_table) & set(self.slab.blocks), sequence
        doubled = [block for block, count in writable.items() if count > 1]
        assert not doubled, f"blocks {doubled} may be written twice"

    # ---- inside --------------------------------------------------------------------------------------------------

    def _lacks_block(self, sequence: Sequence) -> bool:
        return (len(sequence.tokens) - 1) // self.block_size >= len(sequence.block_table)

    def _grow(self, sequence: Sequence) -> bool:
        """Give a decoding sequence the block its newest token needs. Returns whether it has it."""
        if not self._lacks_block(sequence):
            return True
        block = self.slab.take()
        if block is None:
            return False
        sequence.block_table.append(block)
        return True

    def _make_room(self) -> None:
        """Preempt the latest arrival if somebody lacks a block that neither the slab nor the pool has.

        One at a time: its blocks go back to the pool, and the next refill says whether that was enough.
        """
        if not self.slab.is_exhausted:
            return
        self.slab.is_exhausted = False
        if self.is_short:
            own = [sequence for sequence in reversed(self._order) if not sequence.is_kv_only]
            latest = next((sequence for sequence in own if not sequence.is_held), own[0])
            self._release(latest, is_preempted=True)

    def _emit(self, sequence: Sequence, sample: Sample) -> None:
        assert sequence.sampling is not None
        sampling = sequence.sampling
        position = sequence.num_output_tokens
        self.counts.emitted(sequence, position)
        sequence.tokens.append(sample.token)
        is_end = sample.token in self.eos_token_ids and not sampling.ignore_eos
        if is_end or sample.token in sampling.stop_token_ids:
            sequence.finish_reason = "stop"
        elif position + 1 >= sampling.max_tokens or len(sequence.tokens) >= self.max_model_len:
            sequence.finish_reason = "length"
        if not sequence.is_sealed and sequence.finish_reason is None:
            sequence.is_sealed = True
            self._instructions.append(Prefilled(sequence))
        self._instructions.append(Emit(sequence, sample, position, sequence.finish_reason))
        if sequence.finish_reason is not None:
            self._release(sequence)

    def _release(self, sequence: Sequence, *, is_preempted: bool = False) -> None:
        del self._sequences[sequence.sequence_id]
        self._order.remove(sequence)
        table = sequence.block_table.tobytes()
        self._instructions.append(Released(sequence, table, sequence.num_computed_tokens, is_preempted))
        if is_preempted:
            self.counts.num_preemptions += 1
            sequence.displace()
        self._size_slab()

    def _size_slab(self) -> None:
        # A step's worth would be a block for each; half of that is refilled before the next ones need theirs.
        self.slab.target = (self.num_generating + 1) // 2

    def _is_in_flight(self, sequence_id: str) -> bool:
        return self._in_flight is not None and any(chunk.sequence_id == sequence_id for chunk in self._in_flight.chunks)


def _arrival(sequence: Sequence) -> int:
    assert sequence.arrival is not None
    return sequence.arrival
