"""Choosing tokens. The noise is a pure function of (seed, index, position, vocabulary id), never a generator's state.

So a sequence's tokens do not depend on what it was batched with, and survive preemption and recovery. Sampling is the
Gumbel-max trick: ``argmax(logits / T + g)`` with Gumbel noise ``g`` is a draw from ``softmax(logits / T)``.
"""

from collections.abc import Sequence as Items

import torch
from torch import Tensor

from callboard.actors.protocol import SamplingParams
from callboard.kv.tokens import unpack_tokens

from .step import Draw, Sample

# The finalizer of SplitMix64: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014, as
# tuned by Stafford ("Mix13"); the step is 2**64 divided by the golden ratio. Written as signed 64-bit numbers.
GOLDEN_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MIX_2 = 0x94D049BB133111EB - (1 << 64)
MAX_INT64 = (1 << 63) - 1

MIN_TEMPERATURE = 1e-5  # below it logits / T would overflow, and a draw is the greedy token anyway


def noise(seed: int, index: int, position: int, vocab: int | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Return Gumbel noise: float32 of shape [vocab] on ``device``, or at the ids of an int64 tensor, where that is."""
    ids = torch.arange(vocab, device=device) if isinstance(vocab, int) else vocab
    key = torch.tensor(_signed(seed))
    for word in (index, position):
        key = _mix(key + GOLDEN_STEP) ^ _signed(word)
    # Hot: over the vocabulary for each sampled token, so in place (fresh memory would cost more than the arithmetic).
    bits = _mix((ids + 1).mul_(GOLDEN_STEP).add_(_mix(key + GOLDEN_STEP)))
    # 63 bits make a uniform number that is finest near 0, where an exponential is small and the noise is large:
    # so the winning end of the noise keeps its precision in float32.
    uniform = bits.bitwise_and_(MAX_INT64).to(torch.float32).add_(0.5).mul_(2.0**-63).clamp_(max=1 - 2.0**-24)
    exponential = uniform.neg_().log1p_().neg_()
    return exponential.log_().neg_()


def candidates(logits: Tensor, sampling: SamplingParams) -> Tensor | None:
    """Return the vocabulary ids that top-k, and then top-p of what it leaves, keep of one row of logits [vocab].

    None: all of them. Top-p keeps the likeliest tokens up to the one that reaches the mass, so at least one.
    """
    vocab = logits.shape[-1]
    top_k = vocab if sampling.top_k is None else min(sampling.top_k, vocab)
    if top_k == vocab and sampling.top_p >= 1.0:
        return None
    kept, ids = torch.topk(logits, top_k) if top_k < vocab else torch.sort(logits, descending=True)
    if sampling.top_p < 1.0:
        probabilities = torch.softmax(kept / sampling.temperature, dim=-1)
        before = torch.cumsum(probabilities, dim=-1) - probabilities
        ids = ids[: max(1, int((before < sampling.top_p).sum()))]
    return ids


def sample(logits: Tensor, draws: Items[Draw]) -> list[Sample]:
    """Choose one token per row of ``logits`` [len(draws), vocab]. Temperature 0 is greedy."""
    raw = logits = logits.float()
    if any(draw.output for draw in draws):
        logits = torch.stack([_penalize(row, draw) for row, draw in zip(raw, draws, strict=True)])
    chosen = logits.argmax(dim=-1).tolist()
    for row, draw in enumerate(draws):
        if draw.sampling.temperature >= MIN_TEMPERATURE:
            chosen[row] = _choose(logits[row], draw)
    picked = raw.gather(1, torch.tensor(chosen, dtype=torch.int64, device=raw.device)[:, None])[:, 0]
    logprobs = (picked - torch.logsumexp(raw, dim=-1)).tolist()
    return [Sample(token, min(0.0, logprob)) for token, logprob in zip(chosen, logprobs, strict=True)]


def _penalize(logits: Tensor, draw: Draw) -> Tensor:
    """Return one row of logits [vocab] less the penalties of the tokens that are in the output.

    ``logit - count * frequency_penalty - (count > 0) * presence_penalty``: OpenAI's API reference, "Frequency and
    presence penalties".
    """
    if not draw.output:
        return logits
    ids = torch.tensor(unpack_tokens(draw.output), device=logits.device)
    counts = torch.bincount(ids, minlength=logits.shape[-1])
    return logits - counts * draw.sampling.frequency_penalty - (counts > 0) * draw.sampling.presence_penalty


def _choose(logits: Tensor, draw: Draw) -> int:
    sampling = draw.sampling
    ids = candidates(logits, sampling)
    if ids is None:
        shift = noise(sampling.seed, sampling.index, draw.position, logits.shape[-1], logits.device)
        return int((logits / sampling.temperature).add_(shift).argmax())
    shift = noise(sampling.seed, sampling.index, draw.position, ids)
    return int(ids[(logits[ids] / sampling.temperature + shift).argmax()])


def _mix(x: Tensor) -> Tensor:
    """Scramble int64 numbers in place, one to one; products wrap, and the masks make the shifts logical."""
    x.bitwise_xor_((x >> 30).bitwise_and_(0x3FFFFFFFF)).mul_(MIX_1)
    x.bitwise_xor_((x >> 27).bitwise_and_(0x1FFFFFFFFF)).mul_(MIX_2)
    return x.bitwise_xor_((x >> 31).bitwise_and_(0x1FFFFFFFF))


def _signed(word: int) -> int:
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word
