"""A tier on disk: bounded, private, shared with others, and none the worse for what anybody does to its directory."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from tier_disks import CHAIN, SIZE, Disks, data_of, names, on_a_disk, read, write

from callboard.bus.testing import run_virtual
from callboard.kv.tiers import Chain


@on_a_disk
async def test_what_was_written_is_there_in_the_next_life(disks: Disks) -> None:
    await write(await disks.tier(), names(0, 3))
    later = await disks.tier()
    assert await read(later, names(0, 3)) == 3
    assert names(100, 1)[0] not in later


@on_a_disk
async def test_only_this_user_can_read_the_files(disks: Disks) -> None:
    before = os.umask(0)
    try:
        await write(await disks.tier(), names(0, 1))
    finally:
        os.umask(before)
    assert stat.S_IMODE(disks.path.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in disks.files()] == [0o600]


@on_a_disk
async def test_the_directory_never_grows_beyond_its_size(disks: Disks) -> None:
    tier = await disks.tier(5)
    for begin in range(0, 400, 40):
        await write(tier, names(begin, 3))
        assert sum(path.stat().st_size for path in disks.files()) <= 5 * SIZE
        assert await read(tier, names(begin, 3)) == 3
    assert tier.index.check_integrity() == []


@on_a_disk
async def test_of_a_prefix_that_is_too_long_the_beginning_is_kept(disks: Disks) -> None:
    tier = await disks.tier(3)
    await write(tier, names(0, 6))
    assert await read(tier, names(0, 6)) == 3


@on_a_disk
async def test_what_was_read_last_stays_longest_also_in_the_next_life(disks: Disks) -> None:
    tier = await disks.tier(3)
    for begin in (0, 100, 200):
        await write(tier, names(begin, 1))
        os.utime(disks.file(names(begin, 1)[0]), (begin, begin))  # Files of one moment would have no order.
    assert await read(tier, names(0, 1)) == 1
    later = await disks.tier(3)
    await write(later, names(300, 1))
    assert [names(begin, 1)[0] in later for begin in (0, 100, 200, 300)] == [True, False, True, True]


@on_a_disk
async def test_two_managers_share_a_directory_and_its_size(disks: Disks) -> None:
    one, other = await disks.tier(6), await disks.tier(6)
    await write(one, names(0, 3))
    assert await read(other, names(0, 3)) == 3  # It reads what is there, known or not.
    await other.refresh()
    assert all(name in other for name in names(0, 3))
    await write(other, names(0, 3))
    assert len(disks.files()) == 3
    await write(other, names(100, 3))
    await write(one, names(200, 3))
    await one.refresh()
    assert len(disks.files()) == 6
    # Whatever the one has removed is not there for the other, which may not know it yet.
    for begin in (0, 100, 200):
        await read(other, names(begin, 3))
    await other.refresh()
    assert dict.fromkeys(one.index) == dict.fromkeys(other.index)


@on_a_disk
async def test_blocks_of_another_model_count_but_are_never_served(disks: Disks) -> None:
    theirs = Chain(CHAIN.layout, "b model")
    await write(await disks.tier(chain=theirs), names(0, 3, theirs))
    mine = await disks.tier(5)
    assert names(0, 1)[0] not in mine
    assert mine.index.num_bytes == 3 * SIZE
    await write(mine, names(0, 3))
    assert len(disks.files()) == 5


@on_a_disk
async def test_a_directory_that_is_removed_is_made_again(disks: Disks) -> None:
    tier = await disks.tier()
    await write(tier, names(0, 2))
    shutil.rmtree(disks.path)
    assert await read(tier, names(0, 2)) == 0
    with pytest.raises(FileNotFoundError):
        await write(tier, names(0, 1))
    await tier.refresh()
    await write(tier, names(0, 2))
    assert await read(tier, names(0, 2)) == 2


@on_a_disk
async def test_what_a_killed_manager_left_unfinished_is_removed_in_time(disks: Disks) -> None:
    await write(await disks.tier(), names(0, 1))
    (done,) = disks.files()
    old, new = (done.with_name(f"{done.name}.{letter}.part") for letter in "ab")
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (-1000, -1000))  # The clock begins at 0.
    os.utime(new, (0, 0))
    await disks.tier()
    assert disks.files() == [done, new]


FULL_DISK = """
import asyncio, resource, sys
from pathlib import Path
from tier_disks import SIZE, Disks, names, write, read

async def main():
    disks = Disks(Path(sys.argv[1]))
    tier = await disks.tier()
    await write(tier, names(0, 2))
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, resource.RLIM_INFINITY))
    try:
        await write(tier, names(100, 1))
    except OSError as error:
        print(type(error).__name__, names(100, 1)[0] in tier, await read(tier, names(0, 2)), len(disks.files()))

asyncio.run(main())
"""


def test_a_disk_that_is_full_leaves_no_half_of_a_file(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK.replace("asyncio.run(main())", RUN), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "OSError False 2 2\n"
    assert done.stderr.count("cannot be written") <= 1


RUN = "from callboard.bus.testing import run_virtual; run_virtual(main)"


def test_a_file_is_whole_from_its_first_moment(tmp_path: Path) -> None:
    """Whoever looks between any two writes of bytes finds no file, or all of it."""
    seen: list[int] = []

    async def test() -> None:
        disks = Disks(tmp_path)
        tier = await disks.tier()
        (name,) = names(0, 1)
        write_bytes = os.write

        def look_and_write(fd: int, data: bytes) -> int:
            seen.append(disks.file(name).exists())
            return write_bytes(fd, bytes(data[:7]))  # And never more than a few bytes at once.

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "write", look_and_write)
            assert await tier.write(name, data_of(name)) == SIZE
        assert await read(tier, [name]) == 1

    run_virtual(test)
    assert len(seen) > 20
    assert not any(seen)


WRITER = """
import sys
from pathlib import Path
from callboard.bus.testing import run_virtual
from tier_disks import Disks, names, write

async def main():
    disks = Disks(Path(sys.argv[1]))
    tier = await disks.tier(50)
    print("writing", flush=True)
    for begin in range(0, 1 << 30, 40):
        await write(tier, names(begin, 10))

run_virtual(main)
"""


def test_two_managers_that_are_killed_while_they_write_leave_nothing_bad(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "writing\n"
        disks = Disks(tmp_path)
        seen: set[str] = set()
        while len(seen) < 150:  # By then they have written over each other's files, and removed them.
            seen.update(path.name for path in disks.files() if path.suffix == ".kv")
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()

    async def test() -> None:
        tier = await disks.tier(50)
        assert 30 <= len(tier.index) <= 50
        chains = (names(begin, 10) for begin in range(0, 1 << 20, 40))
        found = [chain for chain in chains if chain[0] in tier]
        assert sum([await read(tier, chain) for chain in found]) >= 30
        assert tier.num_bad == 0

    run_virtual(test)
