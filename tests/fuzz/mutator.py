"""Wrong messages, made from right ones: everything is drawn from one seed.

A message is mutated as a tree (its msgpack decoded to lists, numbers and strings), so that most of it stays right and
what is wrong lies deep; or as bytes. What cannot be said with a tree (invalid UTF-8, lengths that lie, extension
types) is put in as raw bytes.
"""

import random
from collections import defaultdict
from typing import Any

import msgspec

from .recorder import Corpus

FUZZ_ADDRESS = ["fuzz", "inproc://fuzz", "somebody"]
"""Where the fuzzer listens: an address in a message may become this one, and then a node dials it."""
MOST_VALUES = 512

Raw = msgspec.Raw
decode = msgspec.msgpack.Decoder().decode
encode = msgspec.msgpack.Encoder().encode

RAW_VALUES = [
    Raw(data)
    for data in (
        b"\xc1",  # the one byte that begins nothing
        b"\xa2\xff\xfe",  # invalid UTF-8
        b"\xa3\xed\xa0\x80",  # a surrogate
        b"\xdd\xff\xff\xff\xff",  # an array of four billion
        b"\xdc\xff\xff",
        b"\xdf\xff\xff\xff\xff",  # a map of four billion
        b"\xdb\xff\xff\xff\xff",  # a string of four gigabytes
        b"\xc6\xff\xff\xff\xff",  # and bytes
        b"\xc9\xff\xff\xff\xff\x01",  # and an extension
        b"\xd4\x01\x00",  # extensions: a small one,
        b"\xd6\xff\x00\x00\x00\x00",  # a timestamp,
        b"\xc7\x0c\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",  # one that cannot be,
        b"\xc7\x00\x05",  # an empty one
        b"\x81\x90\x01",  # a map with a list as its key
        b"\x82\xa1a\x01\xa1a\x02",  # the same key twice
        b"\xca\x7f\xc0\x00\x00",  # NaN in four bytes
        b"\xcf\xff\xff\xff\xff\xff\xff\xff\xff",  # 2**64 - 1
        b"\xd3\x80\x00\x00\x00\x00\x00\x00\x00",  # -2**63
        b"\x91" * 600 + b"\x00",  # deeper than anything real
        b"\x81\xa1a" * 2000 + b"\x00",  # deeper than a stack
    )
]
INTS = [0, 1, -1, 2, 7, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, -(2**31), 2**31, 2**53, 2**63 - 1, -(2**63)]
FLOATS = [0.0, -0.0, -1.0, 0.5, 1e-320, 1e300, -1e300, float("nan"), float("inf"), float("-inf")]
STRINGS = ["", "\0", "a", "x" * 5000, "é", "\U0001f600", "%s%n{0}{x}", "../../etc", "inproc://fuzz", "nan", "0"]
BYTES = [b"", b"\0", b"abc", b"\xff" * 4, b"\0" * 64, b"\x01\0\0\0" * 16, b"\xff\xff\xff\x7f" * 9, bytes(999)]
ODD: list[Any] = [None, True, False, *INTS, *FLOATS, *STRINGS, *BYTES]

COSTLY = {"Post/Generate": 0.03, "Post/StartGenerate": 0.05, "Post/RemoteSend": 0.15, "Post/ComputeKv": 0.15}
"""Messages that make a fleet work for milliseconds where they are right: how often they are left right."""


class Mutator:
    """Draws frames and batches. ``learn`` shows it values that mean something to the fleet as it is now."""

    def __init__(self, rng: random.Random, corpus: Corpus) -> None:
        self.rng = rng
        self._frames: dict[str, list[Any]] = {}
        self._posts: dict[str, dict[str, list[bytes]]] = defaultdict(lambda: defaultdict(list))
        self._values: dict[type, list[Any]] = {str: [], bytes: [], int: [], list: [], float: []}
        for kind, samples in sorted(corpus.items()):
            self._frames[kind] = [frame for _, frame in samples]
            for endpoint, frame in samples:
                self.learn(decode(frame))
                if kind.startswith(("Post/", "TracedPost/")):
                    self._posts[endpoint][kind].append(frame)
        self.kinds = sorted(self._frames)
        self._kinds_at = {endpoint: sorted(kinds) for endpoint, kinds in self._posts.items()}

    def pick(self, items: Any) -> Any:
        """Return one of a list."""
        return items[int(self.rng.random() * len(items))]

    def takes(self, endpoint: str) -> bool:
        """Return whether something was posted to ``endpoint``."""
        return endpoint in self._kinds_at

    # ---- frames, as trees ----------------------------------------------------------------------------------------

    def frame(self, kind: str) -> Any:
        """Return a recorded frame of a kind."""
        return decode(self.pick(self._frames[kind]))

    def has(self, kind: str) -> bool:
        """Return whether such a frame was recorded."""
        return kind in self._frames

    def post(self, endpoint: str, call_id: int) -> Any:
        """Return a recorded Post to an actor at ``endpoint``, under an id of ours, perhaps with an address of ours."""
        kind = self.pick(self._kinds_at[endpoint])
        tree = decode(self.pick(self._posts[endpoint][kind]))
        rng = self.rng
        tree[1] = call_id
        tree[5] = rng.random() * rng.random() * 4  # Seconds; deadlines of the past are made by mutation.
        chance = rng.random()
        if chance < 0.15:
            self._readdress(tree)
        if chance < 0.1 or COSTLY.get(kind.removeprefix("Traced"), 1.0) < rng.random():
            self.mutate(tree, 4)
        elif rng.random() < 0.6:
            self.mutate(tree[4], 1)
        return tree

    def _readdress(self, tree: Any) -> None:
        """Put our own address in place of every other in a tree."""
        for index, child in enumerate(tree):
            if type(child) is list:
                if len(child) == 3 and type(child[1]) is str and child[1].startswith("inproc://"):
                    tree[index] = list(FUZZ_ADDRESS)
                else:
                    self._readdress(child)

    def learn(self, tree: Any) -> None:
        """Remember the values in a tree, in place of older ones."""
        known = self._values.get(type(tree))
        if known is not None:
            value = encode(tree) if type(tree) is list else tree  # A list that is shared would come to hold itself.
            if len(known) < MOST_VALUES:
                known.append(value)
            else:
                known[int(self.rng.random() * MOST_VALUES)] = value
        if type(tree) is list and len(tree) < 64:
            for child in tree:
                self.learn(child)

    # ---- mutations -----------------------------------------------------------------------------------------------

    def mutate(self, tree: Any, begin: int = 0) -> None:
        """Change one to three values of a list in place, from its ``begin``-th on."""
        rng = self.rng
        for _ in range(1 + (rng.random() < 0.25) + (rng.random() < 0.1)):
            node, low = tree, min(begin, len(tree))
            while True:
                if low >= len(node):
                    node.append(self.odd())
                    break
                index = low + int(rng.random() * (len(node) - low))
                child = node[index]
                if type(child) is list and child and rng.random() < 0.75:
                    node, low = child, 0
                    continue
                chance = rng.random()
                if chance < 0.7:
                    node[index] = self._other(child)
                elif chance < 0.8:
                    del node[index]
                elif chance < 0.9:
                    node.insert(index, _copy(child))
                else:
                    node[index] = self.odd()
                break

    def odd(self) -> Any:
        """Return something that hardly belongs anywhere."""
        chance = self.rng.random()
        if chance < 0.05:
            return self.pick(([], [[]], {}, {"a": 1}, {1: 2}, [None], [[], [1]]))
        if chance < 0.6:
            return self.pick(ODD)
        if chance < 0.8:
            return self.pick(RAW_VALUES)
        return self._known(self.pick((str, bytes, int, list, float)))

    def _known(self, kind: type) -> Any:
        values = self._values[kind]
        if not values:
            return self.pick(ODD)
        return decode(self.pick(values)) if kind is list else self.pick(values)

    def _other(self, value: Any) -> Any:
        """Return another value of the same type, most often."""
        rng = self.rng
        kind = type(value)
        if kind not in self._values or rng.random() < 0.15:
            return self.odd()
        chance = rng.random()
        if chance < 0.35:
            return self._known(kind)
        if kind is int:
            return self.pick(INTS) if chance < 0.7 else max(-(2**63), min(2**63, value + self.pick((1, -1, 16, -16))))
        if kind is float:
            return self.pick(FLOATS)
        if kind is str:
            return self.pick(STRINGS) if chance < 0.7 else value[: len(value) // 2] + self.pick(STRINGS)
        if kind is bytes:
            return self.pick(BYTES) if chance < 0.6 else self.flip(value)
        return [] if chance < 0.5 else value[::-1] if chance < 0.7 else value + _copy(value)

    # ---- bytes ---------------------------------------------------------------------------------------------------

    def flip(self, data: bytes) -> bytes:
        """Return bytes with some of them flipped, cut off, put in, doubled, or taken from other messages."""
        rng = self.rng
        mutated = bytearray(data)
        for _ in range(1 + int(rng.random() * 3)):
            at = int(rng.random() * (len(mutated) + 1))
            chance = rng.random()
            if chance < 0.35 and at < len(mutated):
                mutated[at] ^= 1 << int(rng.random() * 8)
            elif chance < 0.5 and at < len(mutated):
                mutated[at] = int(rng.random() * 256)
            elif chance < 0.65:
                del mutated[at:]
            elif chance < 0.75:
                del mutated[at : at + 1 + int(rng.random() * 8)]
            elif chance < 0.85:
                mutated[at:at] = rng.randbytes(1 + int(rng.random() * 8))
            elif chance < 0.92:
                mutated[at:at] = mutated[at // 2 : at]
            else:
                mutated[at:] = self.pick(self._frames[self.pick(self.kinds)])[-(1 + int(rng.random() * 64)) :]
        return bytes(mutated)

    def garbage(self) -> bytes:
        """Return bytes that were never a batch, mostly few, at times many."""
        chance = self.rng.random()
        size = int(self.rng.random() * (64 if chance < 0.95 else 4096 if chance < 0.998 else 200_000))
        return self.rng.randbytes(size)


def _copy(tree: Any) -> Any:
    return [_copy(child) for child in tree] if type(tree) is list else tree
