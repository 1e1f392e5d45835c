"""gloo, by ``torch.distributed``: packed pieces as tensors, some of them on their way while others are packed."""

import os
from typing import Any

import torch
import torch.distributed as dist
from _transfer_job import LAYOUT, Job, Setup, follow_far, follow_near, ready

from .staging import PIECE_BYTES, Packer, pieces

IN_FLIGHT = 4
NEAR, FAR = 0, 1


def connect(setup: Setup, rank: int) -> list[torch.Tensor]:
    """Meet the other end; return the buffers."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{setup.folder}/gloo", rank=rank, world_size=2)
    return [torch.empty(PIECE_BYTES, dtype=torch.uint8) for _ in range(IN_FLIGHT)]


def far(setup: Setup) -> None:
    packer = Packer(setup.target())
    ready()
    buffers = connect(setup, FAR)

    def receive(job: Job) -> None:
        targets = list(pieces(job.blocks()[1]))
        works: dict[int, Any] = {}

        def ask(number: int) -> None:
            if number < len(targets):
                buffer = buffers[number % IN_FLIGHT][: len(targets[number]) * LAYOUT.block_bytes]
                works[number] = dist.irecv(buffer, NEAR)

        for number in range(IN_FLIGHT):
            ask(number)
        for number, blocks in enumerate(targets):
            works.pop(number).wait()
            packer.unpack(blocks, buffers[number % IN_FLIGHT].numpy())
            ask(number + IN_FLIGHT)
        dist.send(torch.zeros(1), NEAR)

    follow_far(receive)


def near(setup: Setup) -> None:
    packer = Packer(setup.source())
    buffers, done = connect(setup, NEAR), torch.zeros(1)

    def move(job: Job) -> None:
        works: list[Any] = []
        for number, blocks in enumerate(pieces(job.blocks()[0])):
            buffer = buffers[number % IN_FLIGHT]
            if number >= IN_FLIGHT:
                works[number - IN_FLIGHT].wait()
            size = packer.pack(blocks, buffer.numpy())
            works.append(dist.isend(buffer[:size], FAR))
        for work in works[-IN_FLIGHT:]:
            work.wait()
        dist.recv(done, FAR)

    follow_near(move)
