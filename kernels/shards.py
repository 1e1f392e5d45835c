"""Which heads of which shard go where, when KV of one degree of tensor parallelism is wanted in another.

A degree splits the KV heads of a model into as many shards, each with the next ``num_kv_heads / degree``. Where the
degree is larger than that, each head is on ``degree / num_kv_heads`` shards next to each other.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HeadCopy:
    """``count`` heads of a source shard, from ``source_head`` on, that go into a target shard from ``target_head`` on.

    Heads are counted within their shard.
    """

    source_shard: int
    source_head: int
    target_shard: int
    target_head: int
    count: int

    @property
    def source_heads(self) -> range:
        return range(self.source_head, self.source_head + self.count)

    @property
    def target_heads(self) -> range:
        return range(self.target_head, self.target_head + self.count)


def heads_of(shard: int, degree: int, num_kv_heads: int) -> range:
    """Return the heads of the model that a shard has. Raises ValueError if the degree does not split them."""
    if degree <= 0 or num_kv_heads <= 0 or (num_kv_heads % degree and degree % num_kv_heads):
        raise ValueError(f"{num_kv_heads} KV heads do not split over {degree} shards")
    if not 0 <= shard < degree:
        raise ValueError(f"there is no shard {shard} of {degree}")
    count = max(1, num_kv_heads // degree)
    begin = shard * num_kv_heads // degree
    return range(begin, begin + count)


def head_copies(num_kv_heads: int, source_degree: int, target_degree: int) -> tuple[HeadCopy, ...]:
    """Return the copies that fill every head of every target shard exactly once, ordered by target.

    Where several source shards have a head, the targets that want it take turns among them. Raises ValueError if a
    degree does not split the heads.
    """
    for degree in (source_degree, target_degree):
        heads_of(0, degree, num_kv_heads)
    return tuple(
        copy
        for shard in range(target_degree)
        for copy in _copies_into(shard, num_kv_heads, source_degree, target_degree)
    )


def _copies_into(target: int, num_kv_heads: int, source_degree: int, target_degree: int) -> Iterator[HeadCopy]:
    wanted = heads_of(target, target_degree, num_kv_heads)
    per_shard = len(heads_of(0, source_degree, num_kv_heads))
    num_copies = max(1, source_degree // num_kv_heads)
    turn = target % max(1, target_degree // num_kv_heads) % num_copies
    head = wanted.start
    while head < wanted.stop:
        source = head // per_shard * num_copies + turn
        first = heads_of(source, source_degree, num_kv_heads).start
        count = min(first + per_shard, wanted.stop) - head
        yield HeadCopy(source, head - first, target, head - wanted.start, count)
        head += count
