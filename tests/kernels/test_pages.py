"""The checked wrappers around the page kernels: what they do on a CPU, what they refuse before anything moves."""

from typing import Any

import pytest
import torch

from callboard.kernels.pages import SlotTable, copy_pages, gather_pages, scatter_pages

SHAPE = (3, 2, 5, 4, 3, 8)
TABLE = SlotTable.of_runs([(7, 3), (0, 2), (19, 1)], "cpu")
SLOTS = [7, 8, 9, 0, 1, 19]


def pool(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_a_table_has_the_slots_of_its_runs_in_order() -> None:
    assert TABLE.slots.tolist() == SLOTS
    assert (len(TABLE), TABLE.end) == (6, 20)
    assert SlotTable.of_blocks([2, 0], 4, "cpu").slots.tolist() == [8, 9, 10, 11, 0, 1, 2, 3]


def test_what_is_gathered_is_found_token_by_token() -> None:
    source, out = pool(torch.bfloat16), torch.zeros(2, 2, 6, 2, 8)
    gather_pages(source, TABLE, out, layers=range(1, 3), heads=range(1, 3))
    for layer in range(2):
        for half in range(2):
            for token, slot in enumerate(SLOTS):
                expected = source[layer + 1, half, slot // 4, slot % 4, 1:3].float()
                assert torch.equal(out[layer, half, token], expected)


def test_what_is_scattered_lies_token_by_token_and_the_rest_is_left() -> None:
    packed, target = torch.randn(1, 2, 6, 2, 8), torch.zeros(SHAPE, dtype=torch.float16)
    scatter_pages(packed, target, TABLE, layers=range(2, 3), heads=range(2))
    for half in range(2):
        for token, slot in enumerate(SLOTS):
            assert torch.equal(target[2, half, slot // 4, slot % 4, :2], packed[0, half, token].half())
    assert int((target != 0).sum()) <= packed.numel()


def test_float8_comes_back_within_its_precision() -> None:
    source, target = pool(), torch.zeros(SHAPE)
    packed, scales = torch.zeros(3, 2, 20, 3, 8).to(torch.float8_e4m3fn), torch.zeros(3, 2, 2)
    table = SlotTable.of_blocks([4, 1, 0, 3, 2], 4, "cpu")
    gather_pages(source, table, packed, layers=range(3), scales=scales)
    scatter_pages(packed, target, table, layers=range(3), scales=scales)
    # Half a step of 3 bits of mantissa; and of the smallest number, a 2**-10th of a scale.
    assert bool(((target - source).abs() <= source.abs() * 2**-4 + scales.max() * 2**-10).all())
    assert not torch.equal(target, source)


def test_pages_go_from_pool_to_pool_of_another_block_size() -> None:
    source, target = pool(), torch.zeros(3, 2, 2, 16, 4, 8, dtype=torch.bfloat16)
    copy_pages(source, target, TABLE, SlotTable.of_runs([(13, 6)], "cpu"), layers=range(3), target_heads=range(1, 4))
    for token, slot in enumerate(SLOTS):
        got = target[:, :, (13 + token) // 16, (13 + token) % 16, 1:]
        assert torch.equal(got, source[:, :, slot // 4, slot % 4].bfloat16())


def test_nothing_is_a_valid_amount() -> None:
    none = SlotTable.of_runs([], "cpu")
    gather_pages(pool(), none, torch.zeros(3, 2, 0, 3, 8), layers=range(3))
    gather_pages(pool(), TABLE, torch.zeros(0, 2, 6, 3, 8), layers=range(0))
    copy_pages(pool(), pool(), none, none, layers=range(3))


GOOD: dict[str, Any] = {"pool": pool(), "table": TABLE, "out": torch.zeros(3, 2, 6, 3, 8), "layers": range(3)}
FP8 = torch.zeros(3, 2, 6, 3, 8).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"pool": pool().flatten(2, 3)}, "a pool is"),
        ({"pool": pool(shape=(3, 1, 5, 4, 3, 8))}, "a pool is"),
        ({"pool": pool(torch.float64)}, "float32, bfloat16 or float16"),
        ({"pool": pool(shape=(3, 2, 5, 4, 8, 3)).transpose(4, 5)}, "contiguous"),
        ({"pool": pool().to("meta")}, "the pool is on meta, and the table of its slots on cpu"),
        ({"table": SlotTable.of_runs([(15, 6)], "cpu")}, "slot 20 is not in a pool of 20 slots"),
        ({"table": SlotTable(TABLE.slots.int(), 20)}, "int64"),
        ({"table": SlotTable(TABLE.slots[::2], 20)}, "contiguous row"),
        ({"layers": range(1, 4)}, "no layers of a pool that has 3"),
        ({"layers": range(-1, 2)}, "no layers"),
        ({"layers": range(0, 3, 2)}, "no layers"),
        ({"heads": range(2, 4)}, "no heads of a pool that has 3"),
        ({"heads": range(2)}, "the packed tokens should be"),
        ({"out": torch.zeros(3, 2, 5, 3, 8)}, "the packed tokens should be"),
        ({"out": torch.zeros(3, 2, 6, 3, 8, dtype=torch.int32)}, "cannot be packed as torch.int32"),
        ({"out": torch.zeros(3, 2, 6, 8, 3).transpose(3, 4)}, "contiguous"),
        ({"out": torch.zeros(3, 2, 6, 3, 8, device="meta")}, "on cpu, where the pool is"),
        ({"out": FP8}, "has scales and nothing else has"),
        ({"scales": torch.zeros(3, 2, 1)}, "has scales and nothing else has"),
        ({"out": FP8, "scales": torch.zeros(3, 2, 2)}, "the scales should be float32"),
        ({"out": FP8, "scales": torch.zeros(3, 2, 1, dtype=torch.float64)}, "the scales should be float32"),
        ({"out": FP8, "scales": torch.zeros(3, 2, 1, device="meta")}, "and the scales on meta"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_sentence(wrong: dict[str, Any], sentence: str) -> None:
    arguments = GOOD | wrong
    with pytest.raises(ValueError, match=sentence):
        gather_pages(
            arguments["pool"],
            arguments["table"],
            arguments["out"],
            layers=arguments["layers"],
            heads=arguments.get("heads"),
            scales=arguments.get("scales"),
        )
    with pytest.raises(ValueError, match=sentence):
        scatter_pages(
            arguments["out"],
            arguments["pool"],
            arguments["table"],
            layers=arguments["layers"],
            heads=arguments.get("heads"),
            scales=arguments.get("scales"),
        )


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"target": pool(shape=(3, 2, 5, 4, 3, 7))}, "heads of 8 do not go into heads of 7"),
        ({"target": pool().flatten(2, 3)}, "6 dimensions"),
        ({"target_table": SlotTable.of_runs([(0, 5)], "cpu")}, "6 tokens do not go into 5 slots"),
        ({"target_heads": range(2)}, "3 heads do not go into 2"),
        ({"target": pool().to("meta")}, "the table of its slots on cpu"),
        (
            {"target": pool().to("meta"), "target_table": SlotTable(TABLE.slots.to("meta"), 20)},
            "one pool is on cpu, the other on meta",
        ),
        ({"layers": range(4)}, "no layers"),
        ({"source_table": SlotTable.of_runs([(15, 6)], "cpu")}, "slot 20"),
    ],
)
def test_pools_that_do_not_fit_each_other_are_refused(wrong: dict[str, Any], sentence: str) -> None:
    given: dict[str, Any] = {
        "source": pool(),
        "target": pool(),
        "source_table": TABLE,
        "target_table": TABLE,
        "layers": range(3),
    }
    with pytest.raises(ValueError, match=sentence):
        copy_pages(**(given | wrong))


@pytest.mark.parametrize("run", [(-1, 2), (3, -1)])
def test_runs_of_slots_that_are_none_are_refused(run: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="are no slots"):
        SlotTable.of_runs([run], "cpu")
