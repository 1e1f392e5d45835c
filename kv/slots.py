"""Token ranges and the slots they lie in."""

from collections.abc import Sequence
from dataclasses import dataclass

from .layout import BadRange, SlotRun


@dataclass(frozen=True, slots=True)
class SlotCopy:
    """``count`` adjacent slots of one pool that go to as many adjacent slots of another."""

    source: int
    target: int
    count: int


def resolve_range(begin: int | None, end: int | None, num_tokens: int) -> tuple[int, int]:
    """Return ``[begin, end)`` with None and negative values resolved; it is empty if ``begin >= end``.

    Raises BadRange if one of them lies outside of the prompt.
    """
    first = 0 if begin is None else begin + num_tokens if begin < 0 else begin
    last = num_tokens if end is None else end + num_tokens if end < 0 else end
    if min(first, last) < 0:
        raise BadRange(begin=begin, end=end, num_tokens=num_tokens, reason="it reaches before the prompt")
    if max(first, last) > num_tokens:
        raise BadRange(begin=begin, end=end, num_tokens=num_tokens, reason="it reaches past the prompt")
    return first, last


def slot_runs(block_table: Sequence[int], begin: int, end: int, block_size: int) -> tuple[SlotRun, ...]:
    """Return the slots of the tokens ``[begin, end)`` of a sequence, adjacent blocks joined."""
    runs: list[SlotRun] = []
    while begin < end:
        offset = begin % block_size
        count = min(block_size - offset, end - begin)
        slot = block_table[begin // block_size] * block_size + offset
        if runs and runs[-1].slot + runs[-1].count == slot:
            runs[-1] = SlotRun(runs[-1].slot, runs[-1].count + count)
        else:
            runs.append(SlotRun(slot, count))
        begin += count
    return tuple(runs)


def cut_runs(runs: Sequence[SlotRun], begin: int, end: int) -> tuple[SlotRun, ...]:
    """Return the slots of the ``begin``-th up to the ``end``-th token of ``runs``."""
    cut = []
    position = 0
    for run in runs:
        if position >= end:
            break
        after = position + run.count
        if after > begin:  # Hot: a long prompt is cut into many pieces (bench/transfer.py).
            first, last = max(begin, position), min(end, after)
            if first < last:
                cut.append(SlotRun(run.slot + first - position, last - first))
        position = after
    return tuple(cut)


def num_slots(runs: Sequence[SlotRun]) -> int:
    """Return how many slots ``runs`` covers."""
    return sum(run.count for run in runs)


def pair_runs(source: Sequence[SlotRun], target: Sequence[SlotRun]) -> list[SlotCopy]:
    """Return the copies that carry the slots of ``source`` to those of ``target``, in order. Both are as long."""
    assert num_slots(source) == num_slots(target)
    copies = []
    pending = [(run.slot, run.count) for run in reversed(target)]
    for run in source:
        slot, left = run.slot, run.count
        while left:
            target_slot, room = pending.pop()
            count = min(left, room)
            copies.append(SlotCopy(slot, target_slot, count))
            if count < room:
                pending.append((target_slot + count, room - count))
            slot, left = slot + count, left - count
    return copies
