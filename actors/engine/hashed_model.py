"""A model in miniature whose KV and tokens are hashes: what a simulated runner computes in place of attention.

It has a transformer's shape: a token's KV in a layer is made of the token, its position, and the KV of *all* tokens
up to it in the layers below; what is sampled is made of the last token after all layers. So a slot with anything but
its own KV (stale, another request's, another position's, or never written) changes every token from there on.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from callboard.actors.protocol import SamplingParams
from callboard.kv.tokens import digest_of, pack_tokens

from .step import Draw

Words = NDArray[np.uint64]

MASK = (1 << 64) - 1
ENDS = 2
"""A slot holds its word at both ends, so that half of a slot's bytes are not all of it."""
_TOKEN = 0x5851F42D4C957F2D
_PLANE = 0x9E3779B97F4A7C15


def embed(tokens: Words, positions: Words) -> Words:
    """Return the state of each token before the first layer."""
    return mix(tokens ^ (positions << np.uint64(32)) ^ np.uint64(_TOKEN))


def kv_words(states: Words, layer: int) -> Words:
    """Return what a layer stores for each token: [2 (keys, values), tokens]."""
    return states[None, :] ^ np.array([[plane(layer, 0)], [plane(layer, 1)]], dtype=np.uint64)


def attend(states: Words, digests: Words) -> Words:
    """Return the states after a layer; ``digests`` are of the words of all tokens up to each, weighted by place."""
    return mix(states ^ mix(digests))


def weights(begin: int, end: int) -> Words:
    """Return the weights of the words at the positions ``[begin, end)``: [2 (keys, values), ENDS, positions], odd."""
    places = np.arange(2 * ENDS * begin, 2 * ENDS * end, dtype=np.uint64)
    odd = mix(places) | np.uint64(1)
    return np.ascontiguousarray(odd.reshape(end - begin, 2, ENDS).transpose(1, 2, 0))


def plane(layer: int, half: int) -> int:
    """Return what tells the words of a layer's keys (half 0) or values (half 1) from those of others."""
    return ((2 * layer + half + 1) * _PLANE) & MASK


def token_of(state: int, draw: Draw, vocab_size: int) -> int:
    """Return the token sampled from a state: with a temperature, another one for each (seed, index, position).

    With penalties, another one for each output so far.
    """
    if draw.sampling.temperature > 0:
        state ^= mix_one(mix_one(draw.sampling.seed) ^ (draw.sampling.index << 32) ^ draw.position)
    if draw.output:
        state ^= int.from_bytes(digest_of(draw.output)[:8], "little")
    return mix_one(state ^ _TOKEN) % vocab_size


def generate(
    prompt: Iterable[int], num_tokens: int, sampling: SamplingParams, *, num_layers: int, vocab_size: int
) -> list[int]:
    """Return the first ``num_tokens`` after ``prompt``, end tokens not observed, without any pool.

    Written apart from the runner, token by token, so that each checks the other.
    """
    tokens = list(prompt)
    places = weights(0, len(tokens) + num_tokens).sum(axis=1, dtype=np.uint64)
    states = embed(np.array(tokens, dtype=np.uint64), np.arange(len(tokens), dtype=np.uint64))
    digests = []
    for layer in range(num_layers):
        running = (kv_words(states, layer) * places[:, : len(tokens)]).sum(axis=0, dtype=np.uint64).cumsum()
        digests.append(int(running[-1]))
        states = attend(states, running)
    state, generated = int(states[-1]), list[int]()
    key_places, value_places = places.tolist()
    for index in range(num_tokens):
        output = pack_tokens(generated) if sampling.presence_penalty or sampling.frequency_penalty else b""
        token = token_of(state, Draw(sampling, index, output), vocab_size)
        generated.append(token)
        at = len(tokens) + index
        state = mix_one(token ^ (at << 32) ^ _TOKEN)
        for layer in range(num_layers):
            key, value = state ^ plane(layer, 0), state ^ plane(layer, 1)
            digests[layer] = (digests[layer] + key * key_places[at] + value * value_places[at]) & MASK
            state = mix_one(state ^ mix_one(digests[layer]))
    return generated


def mix(x: Words) -> Words:
    """Scramble 64-bit words one to one (the finalizer of SplitMix64; sampling.py names the source)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def mix_one(x: int) -> int:
    """Do the same to one number."""
    x &= MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)
