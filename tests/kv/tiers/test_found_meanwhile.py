"""A block that others have put into the directory while it was about to be written from here."""

from pathlib import Path

from tiered_managers import FIRST, SECOND, compute, run, tiers
from two_managers import Fleet, in_virtual_time

from callboard.kv.tokens import pack_tokens


def test_what_has_left_the_pool_is_not_written_from_where_it_was(tmp_path: Path) -> None:
    @in_virtual_time(d_config=tiers("disk", tmp_path))
    async def test(fleet: Fleet) -> None:
        manager = fleet.actors["d"]
        disk, blocks = manager.tiers.disk, manager.blocks
        tokens = pack_tokens(FIRST)
        # All of it in one pass of the loop: nothing is written meanwhile.
        table = list(blocks.admit("engine", "first", tokens).block_table)
        compute(fleet, "d", FIRST, table, 0)
        blocks.finish("engine", "first", tokens, table)
        names = list(manager.tiers._chain.names(manager.tiers._chain.root, tokens, 0))
        for name in names:  # As a look at the directory finds them; others remove them again later.
            disk.index.add(name.key, name.parent, disk.file_bytes)
        others = pack_tokens(SECOND)
        table = list(blocks.admit("engine", "second", others).block_table)
        compute(fleet, "d", SECOND, table, 0)
        blocks.finish("engine", "second", others, table)
        await fleet.clock.sleep(1)
        assert await run(fleet, FIRST) in (0, 40)  # It holds what comes back against what it should be.

    test()
