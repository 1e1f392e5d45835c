"""Whatever lies in a tier's directory under a block's name: it is never served, breaks nothing, and is told of once."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tier_disks import SIZE, Disks, names, on_a_disk, read, warnings_of, write

from callboard.bus.testing import run_virtual


def truncated(path: Path) -> None:
    os.truncate(path, SIZE // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def too_long(path: Path) -> None:
    os.truncate(path, 10 * SIZE)


def changed(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"!")


def another_block(path: Path) -> None:
    path.write_bytes((path.parent / "other").read_bytes())


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "other")


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("harm", [truncated, empty, too_long, changed, another_block, link, directory, pipe])
def test_a_file_that_is_not_what_its_name_says_is_never_served(
    harm: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        disks = Disks(tmp_path)
        first = await disks.tier()
        await write(first, names(0, 2))
        (other,) = names(100, 1)
        await write(first, [other])
        disks.file(other).rename(disks.path / "other")
        harm(disks.file(names(0, 2)[1]))
        for tier in (first, await disks.tier()):
            caplog.clear()
            assert await read(tier, names(0, 2)) == 1
            assert await read(tier, [name for name in names(0, 2) if name in tier]) == 1
            assert sum("is ignored" in each for each in warnings_of(caplog)) <= 1
            assert names(0, 2)[1] not in tier
        assert first.num_bad == 1
        # What is computed instead takes its place (but for a directory, which is not ours to remove).
        if harm is not directory:
            await write(first, names(0, 2))
            assert await read(first, names(0, 2)) == 2
        assert (disks.path / "other").stat().st_size == SIZE

    run_virtual(test)


def test_files_of_others_are_left_alone_and_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        disks = Disks(tmp_path)
        tier = await disks.tier(2)
        for name in ("notes.txt", "a" * 40 + ".kv", f"{'g' * 40}-{'0' * 40}.kv"):
            (disks.path / name).write_text("mine")
        for _ in range(3):
            await tier.refresh()
            await write(tier, names(0, 4))
        assert len(disks.files()) == 3 + 2

    run_virtual(test)
    (warning,) = warnings_of(caplog)
    assert "3 files are no block's" in warning


@pytest.mark.parametrize("what", ["open to others", "a file", "a link"])
def test_a_directory_that_is_not_private_is_not_used(
    what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "cache"
    if what == "a file":
        path.write_text("")
    elif what == "a link":
        (tmp_path / "target").mkdir(mode=0o700)
        path.symlink_to(tmp_path / "target")
    else:
        path.mkdir()
        path.chmod(0o755)

    async def test() -> None:
        tier = await Disks(tmp_path).tier()
        with pytest.raises(FileNotFoundError):
            await write(tier, names(0, 1))
        assert await read(tier, names(0, 1)) == 0
        await tier.refresh()

    run_virtual(test)
    (warning,) = warnings_of(caplog)
    assert "cannot be used" in warning


@on_a_disk
async def test_a_directory_put_in_the_place_of_the_first_is_found_and_looked_at_anew(disks: Disks) -> None:
    tier = await disks.tier()
    await write(tier, names(0, 1))
    disks.path.rename(disks.path.with_name("away"))
    disks.path.mkdir(mode=0o755)
    await tier.refresh()
    with pytest.raises(FileNotFoundError):
        await write(tier, names(0, 1))
    disks.path.chmod(0o700)
    await tier.refresh()
    await write(tier, names(0, 1))
    assert len(disks.files()) == 1
