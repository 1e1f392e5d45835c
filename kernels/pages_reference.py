"""KV pages gathered, scattered and copied in torch: slow, and plainly right. Shapes and rounding as in pages.py."""

import torch
from torch import Tensor

from .pages_numpy import LARGEST, SCALED_TOKENS, SMALLEST_SCALE


def gather(pool: Tensor, slots: Tensor, out: Tensor, layers: range, heads: range, scales: Tensor | None) -> None:
    """Convert the pool's ``slots`` into ``out``."""
    values = _slots_of(pool, layers, heads)[:, :, slots]
    if scales is None:
        out.copy_(values)
        return
    for page, begin in enumerate(range(0, len(slots), SCALED_TOKENS)):
        tokens = values[:, :, begin : begin + SCALED_TOKENS].float()
        scale = scale_of(tokens)
        scales[:, :, page] = scale
        scaled = tokens / scale[:, :, None, None, None]
        # Newer versions of torch saturate by themselves, older ones make NaN of what is too large.
        out[:, :, begin : begin + SCALED_TOKENS] = scaled.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def scatter(packed: Tensor, pool: Tensor, slots: Tensor, layers: range, heads: range, scales: Tensor | None) -> None:
    """Convert packed tokens into the pool's ``slots``."""
    target = _slots_of(pool, layers, heads)
    if scales is None:
        target[:, :, slots] = packed.to(pool.dtype)
        return
    for token, slot in enumerate(slots.tolist()):
        scale = scales[:, :, token // SCALED_TOKENS, None, None]
        target[:, :, slot] = (packed[:, :, token].float() * scale).to(pool.dtype)


def copy(
    source: Tensor,
    target: Tensor,
    source_slots: Tensor,
    target_slots: Tensor,
    layers: range,
    source_heads: range,
    target_heads: range,
) -> None:
    """Convert slots of one pool into those of another."""
    values = _slots_of(source, layers, source_heads)[:, :, source_slots]
    _slots_of(target, layers, target_heads)[:, :, target_slots] = values.to(target.dtype)


def scale_of(tokens: Tensor) -> Tensor:
    """Return the scale of [num_layers, 2, num_tokens, num_kv_heads, head_dim], for each layer's keys and values."""
    magnitudes = tokens.abs().nan_to_num(nan=0.0, posinf=0.0)
    largest = magnitudes.amax(dim=(2, 3, 4))
    scale = (largest / LARGEST).clamp(min=SMALLEST_SCALE)
    return torch.where(largest == 0, torch.ones_like(scale), scale)


def _slots_of(pool: Tensor, layers: range, heads: range) -> Tensor:
    """Return a part of a pool as [num_layers, 2, num_slots, num_kv_heads, head_dim]; it is the pool's own memory."""
    return pool.flatten(2, 3)[layers.start : layers.stop, :, :, heads.start : heads.stop]
