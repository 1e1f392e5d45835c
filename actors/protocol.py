"""Every message of the system. Fields are positional on the wire: append only.

Prompts are int32 token bytes (kv/tokens.py). Ranges are half-open, in tokens of the prompt; negative values count
from the end; None means the whole prompt.
"""

from callboard.bus import Address, Ask, Message, Stream, Tell
from callboard.kv.layout import KvLayout

from .page_protocol import CloseWrite as CloseWrite
from .page_protocol import Done as Done
from .page_protocol import OpenWrite as OpenWrite
from .page_protocol import TakePages as TakePages
from .page_protocol import Tie as Tie
from .page_protocol import Tied as Tied
from .page_protocol import WriteOpened as WriteOpened
from .values import BadRequest as BadRequest
from .values import Counters as Counters
from .values import Entry as Entry
from .values import FinishReason as FinishReason
from .values import KvAddr as KvAddr
from .values import Load as Load
from .values import SamplingParams as SamplingParams
from .values import Stalled as Stalled
from .values import Usage as Usage

# ---- the three verbs, and around them ----------------------------------------------------------------------------


class Reserved(Message, frozen=True):
    """The receiving side's answer: ``begin`` is the first token it still lacks."""

    kv: KvAddr
    begin: int
    end: int
    num_cached_tokens: int


class PrepRecv(Ask[Reserved], frozen=True):
    """To a KV manager: match the prompt and reserve blocks for the rest, under a lease.

    Only what is missing of ``prompt[:end]`` may be written; what lies behind is room for the engine that adopts.
    A repeat for the same request, attempt and engine gets the same reservation. Raises OutOfBlocks when the blocks are
    not free within ``wait_s``, BadRange.
    """

    request_id: str
    attempt: int
    prompt: bytes
    end: int | None = None
    wait_s: float = 0.0
    engine: str = ""
    """For which engine: several may share the manager."""


class Sent(Message, frozen=True):
    """What a remote_send did; answered only when the receiver has sealed. Seconds may overlap: pages leave early."""

    num_bytes: int
    lane: str
    num_computed_tokens: int
    num_reused_tokens: int
    queue_s: float
    compute_s: float
    send_s: float
    tail_s: float
    """Seconds spent sending after the last layer was computed."""


class RemoteSend(Ask[Sent], frozen=True):
    """To the KV manager of the sending engine: compute what ``prompt[:end]`` lacks, write ``[begin, end)`` to ``kv``.

    Raises StaleReservation, BadRange, OutOfBlocks.
    """

    request_id: str
    attempt: int
    prompt: bytes
    kv: KvAddr
    begin: int
    end: int | None
    engine: str
    wait_s: float = 0.0


class Token(Message, frozen=True):
    """One generated token. ``position`` counts output tokens from 0."""

    position: int
    id: int
    logprob: float | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


class StartGenerate(Stream[Token], frozen=True):
    """To an engine: adopt the reservation, compute the KV of ``prompt[begin:]`` and decode."""

    request_id: str
    attempt: int
    prompt: bytes
    sampling: SamplingParams
    begin: int | None = None
    kv: KvAddr | None = None
    num_output_tokens: int = 0
    """The last so many tokens of ``prompt`` are output that was sent already: go on behind them."""


class Probed(Message, frozen=True):
    """How much of a prompt is cached here, how full the pool is, and which start of its process answers."""

    num_cached_tokens: int
    free_blocks: int
    num_blocks: int
    incarnation: str = ""
    cached_blocks: int = 0
    num_tier_tokens: int = 0
    """Of the tokens behind the cached ones, those whose KV is in host memory or on disk."""
    node: str = ""
    """The node that answers."""


class Probe(Ask[Probed], frozen=True):
    """To a KV manager: how much of this prompt is cached? Changes nothing."""

    prompt: bytes


class Release(Ask[Done], frozen=True):
    """To a KV manager: give the reservation back. Sealed blocks stay as prefix cache; a repeat does nothing."""

    kv: KvAddr


class Abort(Ask[Done], frozen=True):
    """To an engine: end every sequence of this request, or of its one attempt. A repeat does nothing."""

    request_id: str
    attempt: int | None = None
    """None: of all attempts."""


# ---- engine and its KV manager -----------------------------------------------------------------------------------


class Attached(Message, frozen=True):
    """The first item of Attach: the pool an engine may map."""

    epoch: str
    num_blocks: int
    pool_path: str
    """A unix socket that hands out the pool's file descriptor, or ``inproc:NAME`` within one process."""
    attachment: str = ""
    """Names this tie. What names another is of one that is over; what names none, of whichever there is."""


class Recall(Message, frozen=True):
    """Give back unused slab blocks (by Give): somebody needs them."""

    num_blocks: int


class Attach(Stream[Attached | Recall], frozen=True):
    """An engine's standing tie to its KV manager: when it ends, everything the engine held is given back.

    Raises BadRequest if the engine's layout, or its model, is not the pool's.
    """

    engine: str
    layout: KvLayout
    address: Address
    fingerprint: str = ""
    """Of the model whose KV it is (model_config.py): engines of one pool share a prefix cache, so it must be one."""


class Admitted(Message, frozen=True):
    """A sequence's blocks: ``block_table`` is int32 bytes, ``num_cached_tokens`` tokens are in place already."""

    block_table: bytes
    num_cached_tokens: int


class Admit(Ask[Admitted], frozen=True):
    """Match ``tokens`` and lease blocks for all of them; with ``kv``, adopt that reservation once it is sealed.

    Raises OutOfBlocks, StaleReservation.
    """

    engine: str
    sequence_id: str
    tokens: bytes
    kv: KvAddr | None = None
    wait_s: float = 0.0
    attachment: str = ""


class Slab(Message, frozen=True):
    """Free blocks an engine may use for growing sequences: int32 bytes, perhaps fewer than asked for, perhaps none."""

    blocks: bytes


class Refill(Ask[Slab], frozen=True):
    """More slab blocks, please. Waits up to ``wait_s`` for the first one."""

    engine: str
    num_blocks: int
    wait_s: float = 0.0
    attachment: str = ""


class Give(Tell, frozen=True):
    """Slab blocks that come back unused (int32 bytes)."""

    engine: str
    blocks: bytes
    attachment: str = ""


class Seal(Tell, frozen=True):
    """The KV of ``tokens`` is in place in ``block_table``: its full blocks may enter the prefix cache."""

    engine: str
    sequence_id: str
    tokens: bytes
    block_table: bytes


class Finish(Tell, frozen=True):
    """The sequence ended or was preempted: as Seal, and then all its blocks are given back."""

    engine: str
    sequence_id: str
    tokens: bytes
    block_table: bytes


class LayersDone(Message, frozen=True):
    """The KV of tokens ``[token_begin, token_end)`` is in place for layers ``[layer_begin, layer_end)``."""

    layer_begin: int
    layer_end: int
    token_begin: int
    token_end: int


class KvComputed(Message, frozen=True):
    """The last item of ComputeKv."""

    num_computed_tokens: int
    queue_s: float
    compute_s: float


class ComputeKv(Stream[LayersDone | KvComputed], frozen=True):
    """KV manager to engine: compute the KV of ``tokens[num_cached_tokens:]`` into ``block_table``, which you borrow."""

    request_id: str
    tokens: bytes
    block_table: bytes
    num_cached_tokens: int
    attachment: str = ""


class KvStats(Message, frozen=True):
    """Where every block of a pool is. ``num_blocks = free + cached + leased + reserved + quarantined``."""

    num_blocks: int
    free: int
    cached: int
    """Held by the prefix cache alone: evictable."""
    leased: int
    """Held by engines: sequences and slabs."""
    reserved: int
    quarantined: int
    num_reservations: int
    num_evicted: int
    problems: tuple[str, ...] = ()
    """What check_integrity() found; empty when all is well."""


class GetKvStats(Ask[KvStats], frozen=True):
    """Count the blocks; first recall unused slab blocks if ``recall`` is set, and check integrity."""

    recall: bool = False


# ---- frontend and router -----------------------------------------------------------------------------------------


class Generate(Stream[Token], frozen=True):
    """Frontend to router: one sequence for one client."""

    request_id: str
    model: str
    prompt: bytes
    sampling: SamplingParams
    priority: int = 0
    headers: dict[str, str] = {}
    num_output_tokens: int = 0
    """The last so many tokens of ``prompt`` are output that the client has: another router sent them."""
    attempt: int = 0
    """The number of the router's first attempt: no other router may have made attempts of that number or above."""


ATTEMPTS_EACH = 65_536
"""Numbers of attempts that each router a request is asked of has for itself: what two of them ask for stays apart."""
FIRST_DIRECT_ATTEMPT = 1 << 40
"""Attempts that no router makes (MLC-LLM's REST) are numbered from here on: no router's get so far, whose ids may be
the same."""


class SubRequest(Message, frozen=True):
    """One call of a verb, as the router saw it. Times are seconds on the router's clock."""

    request_id: str
    verb: str
    actor: str
    start_s: float
    end_s: float
    num_bytes: int = 0
    lane: str = ""
    num_computed_tokens: int = 0
    num_reused_tokens: int = 0
    error: str = ""


class SubRequests(Message, frozen=True):
    """The sub-requests of the last requests, oldest first."""

    items: tuple[SubRequest, ...]


class GetSubRequests(Ask[SubRequests], frozen=True):
    """To a router: the sub-requests of one request, or of the last ``limit`` requests."""

    request_id: str | None = None
    limit: int = 20


# ---- directory ---------------------------------------------------------------------------------------------------


class View(Message, frozen=True):
    """Everybody whose lease holds, ordered by name."""

    version: int
    entries: tuple[Entry, ...]


class Register(Ask[Done], frozen=True):
    """Enter, renew, or update an entry for ``lease_s`` seconds."""

    entry: Entry
    lease_s: float


class Unregister(Ask[Done], frozen=True):
    """Take an entry out at once."""

    name: str


class ListEntries(Ask[View], frozen=True):
    """Everybody, now."""


class Watch(Stream[View], frozen=True):
    """The view now, whenever it changes, and at least every second or so: silence means that it is stale."""
