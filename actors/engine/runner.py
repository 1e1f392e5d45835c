"""Running steps through a transformers model over the mapped pool."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from callboard.actors.model_config import layout_of, read_model_config

from .layer_events import LayerEvents
from .layer_groups import layer_groups
from .model import load_model
from .sampling import sample
from .step import OnLayers, Step, StepResult
from .step_buffers import StepBuffers


class TransformersRunner:
    """A Hugging Face causal LM on ``device``. All chunks of a step go flattened through one forward.

    On a GPU everything is launched from the thread that made the runner, on its stream. No GPU has run this yet.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        block_size: int = 16,
        max_num_batched_tokens: int = 512,
        max_num_seqs: int = 64,
        num_layer_groups: int = 4,
        num_threads: int | None = None,
    ) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self._device = torch.device(device if device.startswith("cuda") else "cpu")
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        self.facts = read_model_config(path)
        self.layout = layout_of(self.facts, block_size, dtype)
        self._model, self._context = load_model(path, dtype, str(self._device))
        self._groups = layer_groups(self.layout.num_layers, num_layer_groups)
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_seqs = max_num_seqs
        self._buffers: StepBuffers | None = None

    def map_pool(self, memory: Any, num_blocks: int) -> None:
        dtype = getattr(torch, self.layout.dtype)
        if self._device.type == "cuda":
            flat = torch.as_tensor(memory, device=self._device).view(dtype)
        else:
            flat = torch.frombuffer(memory, dtype=dtype)
        shape = self.layout.pool_shape(num_blocks)
        self._context.pool = flat[: torch.Size(shape).numel()].view(shape)
        longest = min(self.facts.max_model_len, num_blocks * self.layout.block_size)
        max_blocks = -(-longest // self.layout.block_size) + 1
        self._buffers = StepBuffers(self._max_num_batched_tokens, self._max_num_seqs, max_blocks, self._device)

    def unmap_pool(self) -> None:
        self._context.pool = self._buffers = None

    @torch.inference_mode()
    def run(self, step: Step, on_layers: OnLayers) -> StepResult:
        assert self._buffers is not None, "no pool is mapped"
        draws = self._buffers.fill(step, self.layout.block_size, self._context)
        is_watched = any(chunk.is_kv_only for chunk in step.chunks)
        is_on_gpu = self._device.type == "cuda"
        events = LayerEvents(self._groups, on_layers, torch.cuda.current_stream().record_event) if is_on_gpu else None
        if not is_watched:
            self._context.on_layer = None
        else:
            self._context.on_layer = _by_group(self._groups, on_layers) if events is None else events.launched
        logits = forward(self._model, self._buffers, step.num_tokens, len(draws))
        if events is not None:
            events.finish()
        samples = tuple(sample(logits[0], draws)) if draws else ()
        if is_on_gpu:
            # Other processes read the pool once this returns, and the buffers are filled in anew.
            torch.cuda.current_stream().synchronize()
        return StepResult(samples)


def forward(model: nn.Module, buffers: StepBuffers, num_tokens: int, num_draws: int) -> Tensor:
    """Return the logits [1, max(1, num_draws), vocab] of a step."""
    logits: Tensor = model(
        input_ids=buffers.ids[:, :num_tokens],
        position_ids=buffers.positions[:, :num_tokens],
        use_cache=False,
        logits_to_keep=buffers.rows[: max(1, num_draws)],
    ).logits
    return logits


def _by_group(groups: dict[int, tuple[int, int]], on_layers: OnLayers) -> Callable[[int], None]:
    def on_layer(layer: int) -> None:
        if layer in groups:
            on_layers(*groups[layer])

    return on_layer
