"""NIXL with its UCX backend, held to TCP (``UCX_TLS=tcp``): what vLLM, SGLang and Dynamo move KV with.

``NIXL`` writes every page from its place into its place: one transfer of many descriptors, which were prepared for
the whole pools at the start. ``NIXL packed`` does the work that ``ucx`` does: it packs pieces into registered buffers,
writes each with a notification, and the far end unpacks it.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _transfer_job import (
    LAYOUT,
    NUM_BLOCKS,
    NUM_ROWS,
    PAGE_BYTES,
    Job,
    Setup,
    address,
    follow_far,
    follow_near,
    ready,
)

from callboard.kv.page_store import PageStore

from .staging import PIECE_BLOCKS, PIECE_BYTES, Packer, pieces

IN_FLIGHT = 4
LOCAL = "NIXL_INIT_AGENT"
Array = np.ndarray[Any, np.dtype[Any]]


class End:
    """One end's agent, with the pool and the buffers registered."""

    def __init__(self, name: str, store: PageStore, *, has_thread: bool) -> None:
        # Read when the backend is made. The loopback device: over others UCX would make as many lanes.
        os.environ.update(UCX_TLS="tcp", UCX_NET_DEVICES="lo", NIXL_LOG_LEVEL="ERROR")
        from nixl_cu13._api import nixl_agent, nixl_agent_config

        self.agent = nixl_agent(name, nixl_agent_config(has_thread, backends=["UCX"]))
        self.pool = address(store)
        self.buffers = np.zeros((IN_FLIGHT, PIECE_BYTES), np.uint8)
        regions = [
            (self.pool, NUM_BLOCKS * LAYOUT.block_bytes, 0, ""),
            (self.buffers.ctypes.data, self.buffers.nbytes, 0, ""),
        ]
        self.agent.register_memory(regions, "DRAM")
        self._notes: set[int] = set()

    def await_note(self, number: int) -> None:
        """Wait until the other end has sent this number."""
        while number not in self._notes:
            for notes in self.agent.get_new_notifs().values():
                self._notes.update(map(int, notes))
        self._notes.remove(number)


def far(setup: Setup) -> None:
    store = setup.target()
    # Who polls does better without the thread, which polls too; but who only has memory needs somebody who does.
    end, packer = End("far", store, has_thread=setup.side == "NIXL"), Packer(store)
    ready(f"{end.pool} {end.buffers.ctypes.data} {end.agent.get_agent_metadata().hex()}")
    peer = Path(setup.folder) / "near"

    def receive(job: Job) -> None:
        if setup.side == "NIXL":
            return  # Its agent's thread takes what is written.
        if peer.exists():
            end.agent.add_remote_agent(peer.read_bytes())
            peer.unlink()
        for number, blocks in enumerate(pieces(job.blocks()[1])):
            end.await_note(number)
            packer.unpack(blocks, end.buffers[number % IN_FLIGHT])
            end.agent.send_notif("near", b"%d" % number)

    follow_far(receive)


def near(setup: Setup) -> None:
    pool, buffers, metadata = setup.facts.split()
    store = setup.source()
    end, packer = End("near", store, has_thread=False), Packer(store)
    end.agent.add_remote_agent(bytes.fromhex(metadata))
    (Path(setup.folder) / "near").write_bytes(end.agent.get_agent_metadata())
    move_pages, move_pieces = pages_mover(end, int(pool)), pieces_mover(end, packer, int(buffers))
    follow_near(move_pages if setup.side == "NIXL" else move_pieces)


def prepared(end: End, ours: Array, theirs: Array) -> tuple[Any, Any]:
    """Prepare what may be written, and where: rows of address, size and device."""
    descs = end.agent.get_xfer_descs
    return (
        end.agent.prep_xfer_dlist(LOCAL, descs(ours, "DRAM")),
        end.agent.prep_xfer_dlist("far", descs(theirs, "DRAM")),
    )


def write(end: End, local: Any, froms: Array, remote: Any, tos: Array, note: bytes = b"") -> Any:
    """Begin to write; return the handle."""
    handle = end.agent.make_prepped_xfer("WRITE", local, froms, remote, tos, note)
    if end.agent.transfer(handle) == "ERR":
        raise RuntimeError("NIXL could not begin to write")
    return handle


def finish(end: End, handle: Any) -> None:
    """Wait until all is in place."""
    while (state := end.agent.check_xfer_state(handle)) != "DONE":
        if state == "ERR":
            raise RuntimeError("NIXL could not write")
    handle.release()


def pages_mover(end: End, pool: int) -> Callable[[Job], None]:
    pages = np.arange(NUM_ROWS * NUM_BLOCKS, dtype=np.uint64) * np.uint64(PAGE_BYTES)

    def places(base: int) -> Array:
        rows = np.zeros((len(pages), 3), np.uint64)
        rows[:, 0], rows[:, 1] = pages + np.uint64(base), PAGE_BYTES
        return rows

    def numbers(blocks: list[int]) -> Array:
        rows = np.arange(NUM_ROWS, dtype=np.int32)[:, None] * NUM_BLOCKS
        found: Array = (rows + np.array(blocks, dtype=np.int32)).reshape(-1)
        return found

    local, remote = prepared(end, places(end.pool), places(pool))

    def move(job: Job) -> None:
        froms, tos = job.blocks()
        finish(end, write(end, local, numbers(froms), remote, numbers(tos)))

    return move


def pieces_mover(end: End, packer: Packer, buffers: int) -> Callable[[Job], None]:
    """A descriptor for each block that a buffer has room for; adjacent ones NIXL joins."""
    rooms = np.arange(IN_FLIGHT * PIECE_BLOCKS, dtype=np.uint64) * np.uint64(LAYOUT.block_bytes)

    def places(base: int) -> Array:
        rows = np.zeros((len(rooms), 3), np.uint64)
        rows[:, 0], rows[:, 1] = rooms + np.uint64(base), LAYOUT.block_bytes
        return rows

    local, remote = prepared(end, places(end.buffers.ctypes.data), places(buffers))

    def move(job: Job) -> None:
        handles: list[Any] = []
        for number, blocks in enumerate(pieces(job.blocks()[0])):
            place = number % IN_FLIGHT
            if number >= IN_FLIGHT:
                finish(end, handles[number - IN_FLIGHT])
                end.await_note(number - IN_FLIGHT)
            packer.pack(blocks, end.buffers[place])
            these = np.arange(len(blocks), dtype=np.int32) + place * PIECE_BLOCKS
            handles.append(write(end, local, these, remote, these, b"%d" % number))
        for number in range(max(0, len(handles) - IN_FLIGHT), len(handles)):
            finish(end, handles[number])
            end.await_note(number)

    return move
