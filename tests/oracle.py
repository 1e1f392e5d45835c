"""The one oracle of all tests with real models: every token is the best one, given those before it.

The tokens are teacher-forced through plain transformers in one forward. A lost, repeated or wrong token fails;
a near-tie that another batch shape decided otherwise does not.
"""

import torch
from msgspec.structs import replace
from transformers import PreTrainedModel

from callboard.actors.engine.sampling import MIN_TEMPERATURE, candidates, noise
from callboard.actors.protocol import SamplingParams

TOLERANCE = 1e-3
MASS_TOLERANCE = 1e-4


@torch.inference_mode()
def assert_tokens_pass_oracle(
    model: PreTrainedModel,
    prompt: list[int],
    tokens: list[int],
    sampling: SamplingParams | None = None,
    *,
    tolerance: float = TOLERANCE,
) -> None:
    """Raise AssertionError unless each token's (noise-shifted) logit lies within ``tolerance`` of the best one's."""
    sampling = sampling or SamplingParams()
    assert tokens, "nothing was generated"
    ids = torch.tensor([prompt + tokens[:-1]])
    logits = model(ids, use_cache=False, logits_to_keep=len(tokens)).logits[0].float()
    for position, token in enumerate(tokens):
        penalized = _penalized(logits[position], tokens[:position], sampling)
        shortfall = _shortfall(penalized, token, position, sampling)
        assert shortfall <= tolerance, f"token {token} at {position} lies {shortfall:.4f} below the best of its place"


def _penalized(logits: torch.Tensor, output: list[int], sampling: SamplingParams) -> torch.Tensor:
    """Return logits less penalties, written token by token, otherwise than the engine does it."""
    penalized = logits.clone()
    for token in set(output):
        penalized[token] -= sampling.presence_penalty + output.count(token) * sampling.frequency_penalty
    return penalized


def _shortfall(logits: torch.Tensor, token: int, position: int, sampling: SamplingParams) -> float:
    if sampling.temperature < MIN_TEMPERATURE:
        return float(logits.max() - logits[token])
    shifted = logits + sampling.temperature * noise(sampling.seed, sampling.index, position, len(logits))
    # The last candidate of top-p may fall either side of the threshold: it is allowed, and not demanded.
    allowed, demanded = (_with_mass(logits, sampling, slack) for slack in (MASS_TOLERANCE, -MASS_TOLERANCE))
    if allowed is not None and token not in allowed.tolist():
        return float("inf")
    return float((shifted if demanded is None else shifted[demanded]).max() - shifted[token])


def _with_mass(logits: torch.Tensor, sampling: SamplingParams, slack: float) -> torch.Tensor | None:
    if sampling.top_p >= 1.0:
        return candidates(logits, sampling)
    return candidates(logits, replace(sampling, top_p=min(1.0, max(1e-9, sampling.top_p + slack))))
