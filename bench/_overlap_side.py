"""One process of bench/overlap.py: ``_overlap_side.py ROLE CONFIG``. ROLE is model, p, d or engine.

``model`` makes the model and ends. ``p`` is the sending KV manager, whose lanes are limited, ``d`` the receiving one;
``engine`` computes for p. CONFIG is a Config as JSON. Each prints a line when it is ready, and stays.
"""

import asyncio
import ctypes
import os
import signal
import sys

import msgspec
import uvloop
from _limited_lane import Link, limit_lanes

from callboard.actors.actor import Actor, start_actor
from callboard.actors.engine.config import EngineConfig
from callboard.actors.engine.simulated import Simulation
from callboard.actors.kv_manager import KvManager
from callboard.actors.page_protocol import Done
from callboard.bus import Address, Ask, Node
from callboard.kv.layout import KvLayout


class Config(msgspec.Struct, frozen=True):
    """What all processes of the bench know."""

    folder: str
    num_layers: int
    num_tokens: int
    num_chunks: int
    num_groups: int
    device: str
    transport: str
    dtype: str
    prefill_s: float | None = None
    """What computing a prompt takes if the engine only sleeps; None for a real model."""

    @property
    def layout(self) -> KvLayout:
        """Of SmolLM2-135M, whose shape the model has (but for the number of layers, if told)."""
        return KvLayout(self.num_layers, num_kv_heads=3, head_dim=64, block_size=16, dtype=self.dtype)

    @property
    def num_blocks(self) -> int:
        """Room for two prompts: nothing of an earlier one needs to be there."""
        return 2 * -(-self.num_tokens // 16) + 16

    @property
    def model(self) -> str:
        return f"{self.folder}/model"

    def endpoint(self, name: str) -> str:
        return f"ipc://{self.folder}/{name}"

    def address(self, name: str) -> Address:
        return Address(name, self.endpoint(name), name)


class SetRate(Ask[Done], frozen=True):
    """The link carries so many bytes a second from now on; 0 stands for no limit."""

    bytes_per_s: float


class LinkActor(Actor):
    """Sets the rate of the link that the lanes of its process go over."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def on_set_rate(self, message: SetRate) -> Done:
        self._link.bytes_per_s = message.bytes_per_s or None
        return Done()


def make_model(config: Config) -> None:
    """Save a model of SmolLM2-135M's shape with random weights: what it says does not matter, what it takes does."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = LlamaConfig(
        vocab_size=1024,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=config.num_layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape).save_pretrained(config.model)


async def serve(role: str, config: Config) -> None:
    async with Node(role, endpoint=config.endpoint(role)) as node:
        if role == "engine":
            from callboard.actors.engine.engine import Engine

            engine_config = EngineConfig(
                "engine",
                config.address("p"),
                path="" if config.prefill_s is not None else config.model,
                device=config.device,
                runner="transformers" if config.prefill_s is None else "simulated",
                simulated=Simulation(
                    num_layers=config.num_layers,
                    num_kv_heads=config.layout.num_kv_heads,
                    head_dim=config.layout.head_dim,
                    seconds_per_prefill_token=(config.prefill_s or 0.0) / config.num_tokens,
                ),
                dtype=config.dtype,
                max_num_batched_tokens=-(-config.num_tokens // config.num_chunks),
                num_threads=1,
                num_layer_groups=config.num_groups,
            )
            await start_actor(node, "engine", Engine(engine_config))
        else:
            if role == "p":
                link = Link()
                limit_lanes(link)
                await start_actor(node, "link", LinkActor(link))
            manager = KvManager.Config(
                role,
                config.layout,
                config.num_blocks,
                device=config.device,
                lease_s=60.0,
                socket_dir=f"{config.folder}/pools",
                transport=config.transport,
            )
            await start_actor(node, role, KvManager(manager))
        print("ready", flush=True)
        await asyncio.Event().wait()


def main() -> None:
    role, cores, text = sys.argv[1:]
    os.sched_setaffinity(0, [int(core) for core in cores.split(",")])
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing stays behind, however the run ends.
    config = msgspec.json.decode(text, type=Config)
    if role == "model" or (role == "engine" and config.prefill_s is None):
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    if role == "model":
        make_model(config)
    else:
        uvloop.run(serve(role, config))


if __name__ == "__main__":
    main()
