"""Choosing tokens. The noise is a pure function of (seed, index, position, vocabulary id), never a generator's state.

So a sequence's tokens do not depend on what it was batched with, and survive preemption and recovery. Sampling is the
Gumbel-max trick: ``argmax(logits / T + g)`` with Gumbel noise ``g`` is a draw from ``softmax(logits / T)``.
"""

from collections.abc import Sequence as Items

import torch
from torch import Tensor

from callboard.actors.protocol import SamplingParams

from .step import Draw, Sample

# The finalizer of SplitMix64: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014, as
# tuned by Stafford ("Mix13"); the step is 2**64 divided by the golden ratio. Written as signed 64-bit numbers.
GOLDEN_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MIX_2 = 0x94D049BB133111EB - (1 << 64)

MIN_TEMPERATURE = 1e-5  # below it logits / T would overflow, and a draw is the greedy token anyway


def noise(seed: int, index: int, position: int, vocab: int | Tensor) -> Tensor:
    """Return Gumbel noise: float32 of shape [vocab], or at the vocabulary ids given as an int64 tensor."""
    ids = torch.arange(vocab) if isinstance(vocab, int) else vocab
    key = torch.tensor(_signed(seed))
    for word in (index, position):
        key = _mix(key + GOLDEN_STEP) ^ _signed(word)
    bits = _mix(_mix(key + GOLDEN_STEP) + (ids + 1) * GOLDEN_STEP)
    # 63 bits make a uniform number that is finest near 0, where an exponential is small and the noise is large:
    # so the winning end of the noise keeps its precision in float32.
    uniform = (((bits >> 1) & 0x7FFFFFFFFFFFFFFF).to(torch.float32) + 0.5) * 2.0**-63
    exponential = -torch.log1p(-uniform.clamp(max=1 - 2.0**-24))
    return -torch.log(exponential)


def candidates(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """Return the vocabulary ids that top-k, and then top-p of what it leaves, keep of one row of logits [vocab].

    Top-p keeps the likeliest tokens up to the one that reaches the mass, so at least one.
    """
    vocab = logits.shape[-1]
    top_k = vocab if sampling.top_k is None else min(sampling.top_k, vocab)
    if top_k == vocab and sampling.top_p >= 1.0:
        return torch.arange(vocab, device=logits.device)
    kept, ids = torch.topk(logits, top_k) if top_k < vocab else torch.sort(logits, descending=True)
    if sampling.top_p < 1.0:
        probabilities = torch.softmax(kept / sampling.temperature, dim=-1)
        before = torch.cumsum(probabilities, dim=-1) - probabilities
        ids = ids[: max(1, int((before < sampling.top_p).sum()))]
    return ids


def sample(logits: Tensor, draws: Items[Draw]) -> list[Sample]:
    """Choose one token per row of ``logits`` [len(draws), vocab]. Temperature 0 is greedy."""
    logits = logits.float()
    chosen = logits.argmax(dim=-1).tolist()
    for row, draw in enumerate(draws):
        sampling = draw.sampling
        if sampling.temperature >= MIN_TEMPERATURE:
            ids = candidates(logits[row], sampling)
            shift = noise(sampling.seed, sampling.index, draw.position, ids)
            chosen[row] = int(ids[torch.argmax(logits[row][ids] / sampling.temperature + shift)])
    picked = logits[torch.arange(len(chosen)), torch.tensor(chosen, dtype=torch.int64)]
    logprobs = (picked - torch.logsumexp(logits, dim=-1)).tolist()
    return [Sample(token, min(0.0, logprob)) for token, logprob in zip(chosen, logprobs, strict=True)]


def _mix(x: Tensor) -> Tensor:
    """Scramble int64 numbers one to one; products wrap, and the masks make the shifts logical."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * MIX_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * MIX_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _signed(word: int) -> int:
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word
