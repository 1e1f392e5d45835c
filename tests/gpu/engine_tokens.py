"""Tokens of the engine's runner on a GPU against transformers, and its KV against what it reports.

Tiny models with random weights, one for each kind of attention that is served, in float32: every token must pass the
tests' oracle, which knows only plain transformers on the CPU. The pool is the one that managers hand out.
"""

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch
from oracle import assert_tokens_pass_oracle
from tiny_models import NAMES, generate_tokens, random_prompt, save_tiny_model, tiny_model

from callboard.actors.engine.runner import TransformersRunner
from callboard.actors.engine.step import Chunk, Step
from callboard.actors.protocol import SamplingParams
from callboard.kv.device_store import DeviceStore
from callboard.kv.tokens import pack_tokens

NUM_BLOCKS = 64
LENGTHS = (37, 5, 60, 1, 16, 90)
SAMPLINGS = (
    SamplingParams(max_tokens=20, ignore_eos=True),
    SamplingParams(max_tokens=20, temperature=0.8, seed=5, ignore_eos=True),
    SamplingParams(max_tokens=20, temperature=1.0, top_k=5, top_p=0.9, seed=7, ignore_eos=True),
)


def local_engine() -> Any:
    """Return the class that drives scheduler and runner by hand, from the engine's own tests."""
    path = Path(__file__).parents[1] / "engine" / "conftest.py"
    spec = importlib.util.spec_from_file_location("engine_conftest", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LocalEngine


def tokens_of(name: str, folder: Path, device: str) -> dict[str, Any]:
    """Serve a mixed batch on one model, and hold every token against the oracle."""
    runner = TransformersRunner(save_tiny_model(name, folder), device=device, max_num_batched_tokens=256)
    plain, prompts = tiny_model(name), {}
    memory: Any = memoryview(bytearray(runner.layout.block_bytes * NUM_BLOCKS))
    if device != "cpu":
        memory = DeviceStore.allocate(runner.layout, NUM_BLOCKS, device)
    engine = local_engine()(runner, num_blocks=NUM_BLOCKS, memory=memory, max_num_batched_tokens=32)
    for number, length in enumerate(LENGTHS * 2):
        prompts[str(number)] = random_prompt(length, seed=number)
        engine.submit(str(number), prompts[str(number)], SAMPLINGS[number % len(SAMPLINGS)])
    outputs, problem, num_equal = engine.run(), "", 0
    for number, (key, tokens) in enumerate(outputs.items()):
        sampling = SAMPLINGS[number % len(SAMPLINGS)]
        try:
            assert_tokens_pass_oracle(plain, prompts[key], tokens, sampling)
        except AssertionError as error:
            problem = problem or f"request {key}: {error}"
        if not sampling.temperature:
            num_equal += tokens == generate_tokens(plain, prompts[key], 20)
    return {
        "test": f"{name} on {device}: every token passes the oracle",
        "holds": not problem and len(outputs) == len(prompts),
        "problem": problem,
        "preemptions": sum(sequence.num_preemptions for sequence in engine.finished.values()),
        "equal to generate()": f"{num_equal} of {len(prompts) // len(SAMPLINGS)}",
    }


def reports_of(folder: Path, device: str) -> dict[str, Any]:
    """See what of the pool is in place when the runner says that layers are, from a stream that waits for nothing.

    The model is large enough for the GPU to be behind: what is reported too early would still be zero.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = LlamaConfig(
        vocab_size=1024,
        hidden_size=2048,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(folder / "large")
    num_tokens, dtype = 4096, "bfloat16"
    runner = TransformersRunner(folder / "large", device=device, dtype=dtype, max_num_batched_tokens=num_tokens)
    store = DeviceStore.allocate(runner.layout, num_tokens // 16, device)
    runner.map_pool(store, store.num_blocks)
    pool = store.tensor()
    table = pack_tokens(range(store.num_blocks))
    chunk = Chunk("s", pack_tokens([7] * num_tokens), 0, 0, table, is_kv_only=True)
    step = Step((chunk,), 0, num_tokens)
    runner.run(step, lambda *layers: None)  # Once unseen: libraries are loaded, kernels are chosen.
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    copies: dict[tuple[int, int], torch.Tensor] = {}

    def on_layers(begin: int, end: int) -> None:
        with torch.cuda.stream(stream):
            copies[begin, end] = pool[begin:end].clone()
            stream.synchronize()

    pool.zero_()
    torch.cuda.synchronize()
    runner.run(step, on_layers)
    wrong = [layers for layers, copy in copies.items() if not torch.equal(copy, pool[layers[0] : layers[1]])]
    is_whole = list(copies) == [(0, 2), (2, 4), (4, 6), (6, 8)] and bool((pool != 0).any(dim=-1).all())
    runner.unmap_pool()
    store.close()
    return {
        "test": "layers are reported when their KV is in place, in order",
        "holds": is_whole and not wrong,
        "too early": wrong,
    }


def rows(device: str = "cuda:0") -> list[dict[str, Any]]:
    """Return what was found."""
    with tempfile.TemporaryDirectory() as folder:
        found = [tokens_of(name, Path(folder), device) for name in NAMES]
        return found if device == "cpu" else [*found, reports_of(Path(folder), device)]
