"""Pages over UCX between KV managers in two processes, and what is left when one of them is killed or stopped."""

import asyncio
import signal

import pytest
from kv_peer import (
    LAYOUT,
    NUM_BLOCKS,
    GetDigest,
    Remember,
    Start,
    digest,
    remember,
    running_child,
    running_pair,
    settled,
)
from waiting import PATIENCE_S

from callboard.actors.protocol import Release
from callboard.bus import ActorDied, BusError, LinkLost
from callboard.kv.lanes.ucx import is_installed
from callboard.kv.slots import slot_runs
from callboard.kv.tokens import pack_tokens

pytestmark = pytest.mark.skipif(not is_installed(), reason="ucxx is not installed: it is for Linux on x86_64")

PROMPT = list(range(640))
"""At 32 KiB a token 20 MiB of pages, in ten pieces."""


async def test_pages_cross_processes_over_ucx_whole_and_counted(tmp_path):
    async with running_pair(tmp_path) as pair, running_child(Start("there", str(tmp_path))):
        table = remember(pair.manager, pack_tokens(PROMPT), 1)
        reserved = await pair.prepare(pair.there, PROMPT, end=631)
        sent = await pair.send(pair.here, PROMPT, reserved)
        assert (sent.lane, sent.num_bytes) == ("ucx", 631 * LAYOUT.token_bytes)
        found = await pair.hand.ask(GetDigest(reserved.kv.slots))
        assert found.value == digest(pair.manager.store, slot_runs(table, 0, 631, 16))
        assert found.num_lent == pair.manager.num_lent() == 0
        # The other way, over a wire of its own.
        other = list(range(5000, 5100))
        await pair.hand.ask(Remember(pack_tokens(other), 2))
        back = await pair.prepare(pair.here, other, end=96)
        assert (await pair.send(pair.there, other, back)).lane == "ucx"
        assert pair.manager.store.slot(0, 0, back.kv.slots[0].slot) != bytes(LAYOUT.slot_bytes)
        await pair.there.ask(Release(reserved.kv))
        assert (await settled(pair.there)).reserved == 0


async def test_a_receiver_that_is_killed_ends_the_write_and_its_successor_is_written_to(tmp_path):
    async with running_pair(tmp_path) as pair:
        remember(pair.manager, pack_tokens(PROMPT), 1)
        async with running_child(Start("there", str(tmp_path), dies_at=5)) as child:
            reserved = await pair.prepare(pair.there, PROMPT)
            with pytest.raises((LinkLost, ActorDied)):
                await pair.send(pair.here, PROMPT, reserved, timeout=20)
            assert await child.wait() == -signal.SIGKILL
        assert (await settled(pair.here, lambda stats: stats.leased == 0)).cached == NUM_BLOCKS - 8
        assert pair.manager.num_lent() == 0
        async with running_child(Start("there", str(tmp_path))):
            with pytest.raises(BusError):
                await pair.send(pair.here, PROMPT, reserved)
            again = await pair.prepare(pair.there, PROMPT)
            assert (await pair.send(pair.here, PROMPT, again)).num_bytes == len(PROMPT) * LAYOUT.token_bytes


async def test_a_sender_that_is_killed_leaves_no_block_and_no_buffer_behind(tmp_path):
    async with running_pair(tmp_path, dies_at=5) as pair:
        async with running_child(Start("there", str(tmp_path))) as child:
            pair.manager.pid = child.pid
            await pair.hand.ask(Remember(pack_tokens(PROMPT), 1))
            reserved = await pair.prepare(pair.here, PROMPT)
            sending = asyncio.ensure_future(pair.send(pair.there, PROMPT, reserved, timeout=20))
            await asyncio.wait((sending,))
            assert isinstance(sending.exception(), (LinkLost, ActorDied))
        await pair.here.ask(Release(reserved.kv))
        await settled(pair.here, lambda stats: stats.free == NUM_BLOCKS)
        assert not pair.manager._receiver._lines


async def test_a_receiver_that_is_stopped_holds_nobody_up_and_goes_on_in_order(tmp_path):
    async with running_pair(tmp_path) as pair:
        remember(pair.manager, pack_tokens(PROMPT), 1)
        async with running_child(Start("there", str(tmp_path), dies_at=5, signal=signal.SIGSTOP)) as child:
            reserved = await pair.prepare(pair.there, PROMPT)
            with pytest.raises(LinkLost):
                await pair.send(pair.here, PROMPT, reserved, timeout=20)
            await settled(pair.here, lambda stats: stats.leased == 0)
            assert pair.manager.num_lent() == 0
            child.send_signal(signal.SIGCONT)
            await pair.there.ask(Release(reserved.kv))
            await settled(pair.there, lambda stats: stats.free == NUM_BLOCKS)
            again = await pair.prepare(pair.there, PROMPT, request_id="again")
            assert (await pair.send(pair.here, PROMPT, again)).lane == "ucx"
            assert (await pair.hand.ask(GetDigest(()))).num_lent == 0


async def test_a_sender_that_is_stopped_frees_its_buffers_and_harms_nobody_when_it_wakes_up(tmp_path):
    async with running_pair(tmp_path, dies_at=5, sent=signal.SIGSTOP) as pair:
        async with running_child(Start("there", str(tmp_path))) as child:
            pair.manager.pid = child.pid
            await pair.hand.ask(Remember(pack_tokens(PROMPT), 1))
            reserved = await pair.prepare(pair.here, PROMPT)
            with pytest.raises(LinkLost):
                await pair.send(pair.there, PROMPT, reserved, timeout=20)
            async with asyncio.timeout(PATIENCE_S):
                while pair.manager._receiver._lines:
                    await asyncio.sleep(0.01)
            await pair.here.ask(Release(reserved.kv))
            child.send_signal(signal.SIGCONT)
            await settled(pair.here, lambda stats: stats.free == NUM_BLOCKS)
            await settled(pair.there, lambda stats: stats.leased == 0)
            assert (await pair.hand.ask(GetDigest(()))).num_lent == 0
