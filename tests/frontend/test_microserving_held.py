"""What the microserving door keeps of reservations between a client's calls, without any of them: nothing is left."""

from callboard.actors.frontend.microserving_held import KEEP_S, Held, HeldReservations
from callboard.actors.protocol import KvAddr
from callboard.bus import Address
from callboard.kv.layout import KvLayout

MANAGER = Address("n", "inproc://n", "kv")
LAYOUT = KvLayout(num_layers=2, num_kv_heads=1, head_dim=8)


def held(reservation: str, *, user: str = "u", last_s: float = 0.0) -> Held:
    return Held("e", user, b"digest", 9, 1, KvAddr(MANAGER, "epoch", reservation, LAYOUT, 0, 9, ()), last_s)


def test_a_repeat_that_is_answered_after_its_reservation_was_taken_is_kept_no_longer_than_others() -> None:
    reservations, first, repeat = HeldReservations(), held("r"), held("r")
    reservations.put(first)
    first.is_taken = True  # By a start_generate, while the same prep_recv is asked for once more.
    assert reservations.put(repeat) == []
    reservations.forget(first)
    assert reservations.of("e", "u") is repeat
    assert len(reservations) == 1
    assert reservations.put(held("other", user="v", last_s=KEEP_S)) == [repeat]
    assert reservations.of("e", "u") is None


def test_a_newer_reservation_of_a_request_takes_the_place_of_the_one_before() -> None:
    reservations, first, second = HeldReservations(), held("r1"), held("r2")
    reservations.put(first)
    assert reservations.put(second) == [first]
    assert reservations.named(first.name) is None
    assert reservations.named(second.name) is second
    reservations.forget(first)
    assert reservations.of("e", "u") is second
