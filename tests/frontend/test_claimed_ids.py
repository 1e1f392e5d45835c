"""Ids that clients choose: in flight once in the whole fleet, whichever frontends they come to."""

from pathlib import Path

from callboard.actors.frontend.claimed_ids import ClaimedIds


def test_an_id_is_claimed_by_one_at_a_time(tmp_path: Path) -> None:
    one, two = (ClaimedIds(tmp_path / "requests", name) for name in ("frontend-0", "frontend-1"))
    assert one.claim(["a", "a.1"])
    assert not two.claim(["a"])
    assert not two.claim(["b", "a.1"])
    assert one.claim(["b"]), "who got nothing keeps nothing"
    two.release(["a", "a.1", "b"])
    assert not two.claim(["a"]), "nobody gives back what another has"
    one.release(["a", "a.1", "b"])
    assert two.claim(["a", "a.1", "b"])
    two.release(["a", "a.1", "b"])
    assert not list((tmp_path / "requests").iterdir())


def test_one_that_starts_again_gives_back_what_it_had_and_nothing_else(tmp_path: Path) -> None:
    one, two = (ClaimedIds(tmp_path / "requests", name) for name in ("frontend-0", "frontend-1"))
    assert one.claim(["mine"])
    assert two.claim(["other"])
    again = ClaimedIds(tmp_path / "requests", "frontend-0")
    assert again.claim(["mine"])
    assert not again.claim(["other"])


def test_any_id_that_the_door_takes_can_be_claimed(tmp_path: Path) -> None:
    one = ClaimedIds(tmp_path / "requests", "frontend-0")
    odd = [".", "..", "x" * 64, "-", "a.b_c-d"]
    assert one.claim(odd)
    assert not ClaimedIds(tmp_path / "requests", "frontend-1").claim([".."])
    one.release(odd)
    assert not list((tmp_path / "requests").iterdir())
    assert (tmp_path / "requests").stat().st_mode & 0o777 == 0o700


def test_a_disk_that_takes_nothing_more_stops_no_request(tmp_path: Path) -> None:
    one = ClaimedIds(tmp_path / "requests", "frontend-0")
    (tmp_path / "requests").rmdir()
    assert one.claim(["a"])
    one.release(["a"])
