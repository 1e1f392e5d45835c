"""The KV of a sequence that runs, sent to another pool: nothing is computed, and no block is waited for."""

from callboard.actors.move_protocol import NotMovable, SendHeld
from callboard.actors.protocol import BadRequest, RemoteSend
from callboard.kv.block_manager import BlockManager, Loan
from callboard.kv.layout import BadRange
from callboard.kv.tokens import TOKEN_BYTES, num_tokens, unpack_tokens


def as_remote_send(message: SendHeld) -> RemoteSend:
    """Return the send that it is, apart from where its blocks come from. Raises BadRange."""
    length = num_tokens(message.tokens)
    if len(message.tokens) % TOKEN_BYTES or not 0 <= message.begin <= message.end == length:
        reason = "the tokens of a sequence that is sent end where the range does"
        raise BadRange(begin=message.begin, end=message.end, num_tokens=length, reason=reason)
    request_id, attempt, tokens = message.request_id, message.attempt, message.tokens
    return RemoteSend(request_id, attempt, tokens, message.kv, message.begin, message.end, message.engine)


def lend_held(blocks: BlockManager, message: SendHeld) -> Loan:
    """Hold the sequence's blocks until they are sent. Raises NotMovable, BadRequest, UnknownActor."""
    try:
        table = unpack_tokens(message.block_table)
        loan = blocks.lend_held(message.engine, message.sequence_id, message.tokens, table, message.attachment)
    except ValueError as error:
        raise BadRequest(reason=f"SendHeld of {message.sequence_id}: {error}") from None
    if loan is None:
        raise NotMovable(request_id=message.request_id, reason="its blocks have been given back")
    return loan
