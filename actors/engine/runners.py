"""Making the runner an engine's configuration asks for. Blocking; torch is imported only here, and only if needed."""

from callboard.actors.model_config import read_model_config

from .config import EngineConfig
from .simulated import SimulatedRunner
from .step import Runner


def make_runner(config: EngineConfig) -> Runner:
    """Load the model. Raises ModelConfigError for one that cannot be served."""
    if config.runner == "simulated":
        simulation = config.simulated
        if config.path:
            simulation = simulation.shaped_like(read_model_config(config.path))
        return SimulatedRunner(
            simulation, dtype=config.dtype, block_size=config.block_size, num_layer_groups=config.num_layer_groups
        )
    from .runner import TransformersRunner

    return TransformersRunner(
        config.path,
        device=config.device,
        dtype=config.dtype,
        block_size=config.block_size,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        num_layer_groups=config.num_layer_groups,
        num_threads=config.num_threads,
    )
