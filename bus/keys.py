"""The keys of a fleet's nodes: one secret, and from it a CURVE key pair for every name.

Whoever holds the secret knows everybody's public key by name, so that nothing else has to be handed out, and nodes
nobody listed (a command, a node of a user's own) can join. Public keys are no more public than the secret: they are
never sent nor written down, and who does not know that of a node cannot even begin the handshake with it.

A node that is dialled shows its key in that handshake. A node that dials shows two things: in the handshake the
members' key, which is all that ZAP can ask for (it sees a key before any name, and names cannot be listed), and in its
Hello a keyed hash under its own.
"""

import hashlib
import hmac
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import msgspec
import zmq
from zmq.utils import z85

from .private import why_open

KEY_FILE = "fleet.key"
SECRET_BYTES = 32
PROOF_BYTES = 16

_LINE = re.compile(r"callboard-key-1 ([0-9a-f]{64})")


class KeysError(ValueError):
    """Keys that cannot be had or used; the text is a sentence for people, without anything secret."""


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A CURVE key pair, each key as the 40 characters (Z85) that ZeroMQ takes."""

    public: bytes
    secret: bytes = field(repr=False)


class FleetKeys:
    """The keys of the fleet of that name. Raises KeysError for a secret that is none, or without CURVE in libzmq."""

    def __init__(self, secret: bytes, fleet: str) -> None:
        if len(secret) != SECRET_BYTES:
            raise KeysError(f"the secret of a fleet has {SECRET_BYTES} bytes, not {len(secret)}")
        if not zmq.has("curve"):
            raise KeysError('this pyzmq has no CURVE: run "pip install --force-reinstall pyzmq" for one that has')
        self.fleet = fleet
        self._secret = secret
        self.member = self._pair(b"callboard member", "")
        """With this key every node of the fleet dials."""

    @classmethod
    def read(cls, folder: Path, fleet: str) -> Self:
        """Return the keys in a directory that ``callboard keys new`` made. Raises KeysError."""
        return cls(read_secret(folder), fleet)

    def __repr__(self) -> str:
        return f"FleetKeys(fleet={self.fleet!r})"

    def of(self, node: str) -> KeyPair:
        """Return the key pair with which the node of that name is dialled."""
        return self._pair(b"callboard node", node)

    def proof(self, node: str, incarnation: str) -> bytes:
        """Return what shows that whoever sends it holds the key of ``node``, in this incarnation."""
        own = z85.decode(self.of(node).secret)
        person = b"callboard hello"
        return hashlib.blake2b(incarnation.encode(), key=own, person=person, digest_size=PROOF_BYTES).digest()

    def is_proof(self, proof: bytes, node: str, incarnation: str) -> bool:
        """Say whether ``proof`` is that of the node and incarnation, in a time that tells nothing of it."""
        return hmac.compare_digest(proof, self.proof(node, incarnation))

    def _pair(self, person: bytes, node: str) -> KeyPair:
        # Any 32 bytes are a secret key of Curve25519: libsodium clamps the scalar itself.
        data = msgspec.json.encode((self.fleet, node))
        secret = z85.encode(hashlib.blake2b(data, key=self._secret, person=person, digest_size=32).digest())
        return KeyPair(zmq.curve_public(secret), secret)


def fingerprint(secret: bytes) -> str:
    """Return what tells secrets apart and may be shown: it says nothing of the secret."""
    digest = hashlib.blake2b(key=secret, person=b"callboard finger", digest_size=8).hexdigest()
    return "-".join(digest[i : i + 4] for i in range(0, 16, 4))


def format_secret(secret: bytes) -> str:
    """Return the text of a key file."""
    warning = "# The key of a Callboard fleet. Who reads it can join the fleet, and read and forge its messages."
    return f"{warning}\ncallboard-key-1 {secret.hex()}\n"


def read_secret(folder: Path) -> bytes:
    """Return the secret in a directory of keys. Raises KeysError where it is missing, damaged, or open to others."""
    path = folder / KEY_FILE
    try:
        reason = why_open(folder, folder.stat())
        # Not waiting: at a pipe of that name it would for ever.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            found = os.fstat(fd)
            data = os.read(fd, 4096) if stat.S_ISREG(found.st_mode) else b""
        finally:
            os.close(fd)
    except (FileNotFoundError, NotADirectoryError):
        raise KeysError(
            f'there is no key file {path}: make one with "callboard keys new {folder}", or copy the fleet\'s there'
        ) from None
    except OSError as error:
        raise KeysError(f"cannot read the key file {path}: {error.strerror}") from None
    if reason := reason or why_open(path, found):
        raise KeysError(f"the keys are not used, because {reason}")
    lines = [line for line in data.decode(errors="replace").splitlines() if line and not line.startswith("#")]
    match = _LINE.fullmatch(lines[0]) if len(lines) == 1 else None
    if match is None:
        raise KeysError(
            f"{path} is damaged, or no key file: copy it anew, "
            f'or make one with "callboard keys new {path.parent} --force"'
        )
    return bytes.fromhex(match[1])
