"""Models for whole fleets: tiny random ones, and the embedded one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_model, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from callboard.actors.embedded_model import embedded_gguf, resolve
from callboard.actors.model_config import layout_of, read_model_config
from callboard.kv.layout import KvLayout
from callboard.tools.running import cache_dir

TinyModel = tuple[Path, KvLayout, PreTrainedModel]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    """Return directory, KV layout and plain transformers model of a tiny architecture."""
    folder = tmp_path_factory.mktemp("models")
    made: dict[str, TinyModel] = {}

    def make(name: str) -> TinyModel:
        if name not in made:
            path = save_tiny_model(name, folder)
            made[name] = path, layout_of(read_model_config(path)), tiny_model(name)
        return made[name]

    return make


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Return the embedded model's directory, converted on first use."""
    return resolve(str(embedded_gguf()), cache_dir(), print)


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> PreTrainedModel:
    """Return the embedded model as plain transformers has it."""
    return AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32).eval()
