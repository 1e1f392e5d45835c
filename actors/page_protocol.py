"""What KV managers say to each other: a tie, and the writes under it. Fields are positional on the wire: append only.

protocol.py has them too, with every other message of the system.
"""

from callboard.bus import Address, Ask, Message, Stream
from callboard.kv.lanes.choose import MAPPED, LaneOffer
from callboard.kv.layout import KvLayout, SlotRun


class Done(Message, frozen=True):
    """It was done, or there was nothing to do."""


class Tied(Message, frozen=True):
    """The first and only item of Tie: the pool that may be written into, and the lanes into it, best first."""

    pool_path: str
    offers: tuple[LaneOffer, ...] = ()
    layout: KvLayout | None = None
    num_blocks: int = 0


class Tie(Stream[Tied], frozen=True):
    """A sending KV manager's standing tie to a receiving one.

    Raises StaleReservation for another epoch, NoLane where no lane leads from one to the other.
    """

    epoch: str
    writer: Address | None = None
    """Where the sending one is: to be asked whether it is still the same process, if the tie breaks."""
    lanes: tuple[str, ...] = MAPPED
    """The kinds of lanes that the sending one can go."""
    machine: str = ""
    """Where it runs: what is mapped is mapped on one machine."""
    gpu: str = ""
    """The uuid of the GPU that its pool is on; empty for host memory."""


class WriteOpened(Message, frozen=True):
    """Leave to write, and where: the slots of the write's tokens, as the pool's owner has them."""

    pool_path: str
    num_blocks: int
    slots: tuple[SlotRun, ...] = ()
    wants_digests: bool = False
    """Whether CloseWrite must say what the pages should be."""


class OpenWrite(Ask[WriteOpened], frozen=True):
    """The sending manager is about to write ``[begin, end)`` of a reservation. Raises StaleReservation, BadRange."""

    reservation_id: str
    epoch: str
    write_id: str
    begin: int
    end: int
    prompt_digest: bytes = b""
    """Of the prompt's tokens ``[0, end)`` (kv/tokens.py): no others' KV must be sealed under the reservation's."""


class TakePages(Ask[Done], frozen=True):
    """A packed piece of an open write comes over the tie's lane under ``tag``; answered when it is in its slots.

    It holds the KV of the tokens ``[token_begin, token_end)`` for layers ``[layer_begin, layer_end)``, in
    ``num_bytes`` bytes (kv/packed_form.py). Raises StaleReservation if the write is not open, BadRange.
    """

    reservation_id: str
    epoch: str
    write_id: str
    token_begin: int
    token_end: int
    layer_begin: int
    layer_end: int
    tag: int
    num_bytes: int
    wire_dtype: str


class CloseWrite(Ask[Done], frozen=True):
    """The write is over and will never touch the slots again; ``is_complete`` says whether all of it is in place.

    ``digests`` are those of its pages (kv/digests.py), where they were asked for. Raises CorruptPages.
    """

    reservation_id: str
    epoch: str
    write_id: str
    is_complete: bool
    digests: bytes = b""
