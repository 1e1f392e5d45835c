"""What an engine is told at its start."""

from typing import Literal

import msgspec

from callboard.bus import Address

from .simulated import Simulation


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One engine: one replica of one model on one device, tied to one KV manager."""

    name: str
    """The engine's name in the fleet, and at its manager."""
    manager: Address
    model: str = ""
    """The name under which the model is served; the engine's own where empty."""
    path: str = ""
    """The model's directory; unused by a simulated runner."""
    roles: tuple[str, ...] = ("prefill", "decode")
    device: str = "cpu"
    runner: Literal["transformers", "simulated"] = "transformers"
    dtype: str = "float32"
    block_size: int = 16
    max_num_batched_tokens: int = 512
    max_num_seqs: int = 64
    max_model_len: int | None = None
    """The most tokens of a sequence; the model's and the pool's limits hold besides."""
    num_threads: int | None = None
    num_layer_groups: int = 4
    """In how many parts a step's KV is reported while it is computed."""
    max_buffered_tokens: int = 256
    """Tokens a sequence may be ahead of whoever reads it; then it pauses."""
    stall_s: float = 30.0
    """A paused sequence of which nothing is read for so long is ended with Stalled."""
    simulated: Simulation = Simulation()
    is_draining: bool = False
    """Whether it begins without being offered to any request: it was draining when it ended."""
    fingerprint: str = ""
    """Of the model (model_config.py): the pool must be of the same one."""

    def limits(self, max_model_len: int) -> dict[str, str]:
        """Return what the directory tells of the engine's steps: enough to simulate it elsewhere."""
        return {
            "block_size": str(self.block_size),
            "max_num_batched_tokens": str(self.max_num_batched_tokens),
            "max_num_seqs": str(self.max_num_seqs),
            "max_model_len": str(max_model_len),
        }
