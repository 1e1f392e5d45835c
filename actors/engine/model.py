"""Any Hugging Face causal LM, its attention replaced by Callboard's over a paged pool.

transformers lets an attention function be registered by name; ours finds the step's metadata in the PagedContext that
the runner has set on the model's modules. What would be wrong without a word is refused with a sentence, at load.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface

from callboard.actors.model_config import ModelConfigError, ModelFacts, facts_of, layout_of
from callboard.kernels.paged_attention import paged_attention
from callboard.kv.layout import KvLayout

ATTENTION_NAME = "callboard_paged"
CONTEXT_ATTRIBUTE = "callboard_context"


class PagedContext:
    """What attention must know besides its own layer's queries, keys and values. The runner owns and changes it."""

    def __init__(self) -> None:
        self.pool: Tensor | None = None
        """[num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]"""
        self.slots = self.block_tables = self.context_lens = self.query_start = self.split = torch.empty(0)
        self.host_lens: Tensor | None = None
        """context_lens and query_start once more, where those are on a GPU."""
        self.on_layer: Callable[[int], None] | None = None
        """Called with a layer's index when its KV is in place."""


def load_model(directory: str | Path, dtype: str, device: str = "cpu") -> tuple[nn.Module, PagedContext]:
    """Load a model for paged attention onto ``device``. Raises ModelConfigError for what cannot be served correctly."""
    try:
        config = AutoConfig.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise ModelConfigError(f"transformers cannot read the model in {directory}: {error}") from None
    if problem := problem_of(config.to_dict()):
        raise ModelConfigError(f"the model in {directory} cannot be served: {problem}")
    AttentionInterface.register(ATTENTION_NAME, attend)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)
    model = AutoModelForCausalLM.from_pretrained(
        directory, config=config, dtype=getattr(torch, dtype), attn_implementation=ATTENTION_NAME
    ).eval()
    model.to(device)
    facts = facts_of(config.to_dict())
    return model, adopt_model(model, facts, layout_of(facts, dtype=dtype))


def adopt_model(model: nn.Module, facts: ModelFacts, layout: KvLayout) -> PagedContext:
    """Give a model that was built for ATTENTION_NAME its context, and prove on one token that every layer uses it.

    Raises ModelConfigError where a layer keeps its state elsewhere, or attends in a way that is not implemented.
    """
    context = PagedContext()
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            setattr(module, CONTEXT_ATTRIBUTE, context)
    seen: list[int] = []
    context.on_layer = seen.append
    device = next(model.parameters()).device
    context.pool = torch.zeros(layout.pool_shape(1), dtype=getattr(torch, layout.dtype), device=device)
    context.slots = torch.tensor([0], device=device)
    context.block_tables = torch.tensor([[0]], dtype=torch.int32, device=device)
    context.context_lens = torch.tensor([1], device=device)
    context.query_start = torch.tensor([0, 1], device=device)
    context.split = torch.tensor([1, 1])
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
    rows = torch.tensor([0], device=device)
    try:
        with torch.inference_mode():
            model(input_ids=ids, position_ids=ids, use_cache=False, logits_to_keep=rows)
    except (ValueError, TypeError) as error:
        raise ModelConfigError(f"this model cannot be served: {error}") from None
    finally:
        context.pool, context.on_layer = None, None
    if seen != list(range(facts.num_layers)):
        raise ModelConfigError(
            f"this model cannot be served: of its {facts.num_layers} layers only {len(set(seen))} use paged attention"
        )
    return context


def problem_of(config: dict[str, Any]) -> str | None:
    """Return why a model with this config would be served wrongly, or None."""
    text = config.get("text_config") or config
    if config.get("is_encoder_decoder"):
        return "it is an encoder-decoder model"
    if text.get("add_cross_attention"):
        return "it uses cross attention"
    if text.get("attn_logit_softcapping"):
        return "its attention logits are soft-capped, which paged attention does not do"
    if text.get("use_bidirectional_attention"):
        return "its attention is not causal"
    if text.get("position_embedding_type") not in (None, "absolute") or text.get("alibi"):
        return "its attention has a position bias, which paged attention does not add"
    kinds = set(text.get("layer_types") or ()) - {"full_attention", "sliding_attention", "attention"}
    if kinds or text.get("attention_chunk_size"):
        return f"it has layers of {', '.join(sorted(kinds)) or 'chunked attention'}, which keep no plain KV"
    return None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend over the pool: the function transformers calls in each layer.

    query [1, num_heads, num_tokens, head_dim] after rotary; key, value [1, num_kv_heads, num_tokens, head_dim].
    """
    if softcap is not None or s_aux is not None:
        raise ValueError(
            f"{type(module).__name__} uses soft-capped logits or attention sinks, which are not implemented"
        )
    if getattr(module, "is_causal", True) is False:
        raise ValueError(f"{type(module).__name__} is not causal")
    if query.shape[-1] != value.shape[-1]:
        raise ValueError("keys and values are of different sizes")
    context: PagedContext = getattr(module, CONTEXT_ATTRIBUTE)
    layer = module.layer_idx
    assert context.pool is not None
    assert isinstance(layer, int)
    attended = paged_attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        context.pool[layer],
        context.slots,
        context.block_tables,
        context.context_lens,
        context.query_start,
        context.split,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window,
        context.host_lens,
    )
    if context.on_layer is not None:
        context.on_layer(layer)
    return attended[None], None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Causality and windows are the attention function's business."""
