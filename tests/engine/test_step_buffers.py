"""A step's metadata, and its twin where the model computes."""

import torch

from callboard.actors.engine.model import PagedContext
from callboard.actors.engine.step import Chunk, Draw, Step
from callboard.actors.engine.step_buffers import StepBuffers, _Tensors
from callboard.actors.protocol import SamplingParams
from callboard.kv.tokens import pack_tokens

CPU = torch.device("cpu")
DRAW = Draw(SamplingParams(), 0)
STEP = Step(
    (
        Chunk("a", pack_tokens([5]), 6, 6, pack_tokens([3, 1]), DRAW),
        Chunk("b", pack_tokens([7, 8, 9]), 2, 4, pack_tokens([2, 0]), DRAW),
    ),
    num_decodes=1,
    num_tokens=4,
)


def test_a_step_is_laid_out_for_attention():
    buffers, context = StepBuffers(16, 4, 8, CPU), PagedContext()
    assert buffers.fill(STEP, 4, context) == [DRAW, DRAW]
    assert buffers.ids[0, :4].tolist() == [5, 7, 8, 9]
    assert buffers.positions[0, :4].tolist() == [6, 2, 3, 4]
    assert context.slots.tolist() == [1 * 4 + 2, -1, -1, 0 * 4 + 0]
    assert context.context_lens[:2].tolist() == [7, 5]
    assert context.query_start[:3].tolist() == [0, 1, 4]
    assert context.split.tolist() == [1, 2, 2], "decodes, sequences, slots that nothing is written to"
    assert buffers.rows[:2].tolist() == [0, 3]
    assert context.host_lens is None, "they are on the host themselves"


def test_a_twin_has_what_a_step_uses():
    here, there = _Tensors(16, 4, 8, CPU), _Tensors(16, 4, 8, CPU)
    for number, tensor in enumerate(vars(here).values()):
        tensor.fill_(number + 1)
    there.follow(here, 5, 2, 3)
    assert there.ids[0].tolist() == [1] * 5 + [0] * 11
    assert there.positions[0].tolist() == [2] * 5 + [0] * 11
    assert there.slots.tolist() == [3] * 5 + [0] * 11
    assert (there.block_tables[:2] == 4).all()
    assert (there.block_tables[2:] == 0).all()
    assert torch.equal(there.lens, here.lens)
    assert there.rows.tolist() == [6, 6, 6, 0]
