"""Over which network device pages go: the one with the address that a node was told to listen at.

UCX would choose by itself among all that seem to lead to the other host, and several at a time; the address says which
network pages are meant for.
"""

import os
import socket
import struct
from collections.abc import Iterator, MutableMapping
from pathlib import Path

VARIABLE = "UCX_NET_DEVICES"
_RTM_GETADDR, _NLMSG_DONE, _NLMSG_ERROR = 22, 3, 2
_REQUEST, _DUMP = 0x1, 0x300
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_HEADER = struct.Struct("=IHHII")
_ADDRESS = struct.Struct("=BBBBi")
_ATTRIBUTE = struct.Struct("=HH")


def use_device_of(address: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Have UCX, which is not started yet, use the device with that address alone.

    Where there are InfiniBand or RoCE devices the choice is left to it, as it is where the user has made one.
    """
    if VARIABLE in environment or any(Path("/sys/class/infiniband").glob("*")):
        return
    device = device_of(address)
    if device is not None:
        environment[VARIABLE] = device


def device_of(address: str) -> str | None:
    """Return the name of the network device that has an IP address; None if none has."""
    for index, found in _addresses():
        if found == address:
            return socket.if_indextoname(index)
    return None


def _addresses() -> Iterator[tuple[int, str]]:
    """Yield the index of a device and an address of it, for every address of this host (rtnetlink(7))."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as asked:
        request = _HEADER.pack(_HEADER.size + 4, _RTM_GETADDR, _REQUEST | _DUMP, 1, 0) + bytes(4)
        asked.send(request)
        while True:
            data = memoryview(asked.recv(1 << 16))
            while data:
                length, kind, *_ = _HEADER.unpack_from(data)
                if kind in (_NLMSG_DONE, _NLMSG_ERROR):
                    return
                yield from _address(data[_HEADER.size : length])
                data = data[(length + 3) & ~3 :]


def _address(message: memoryview) -> Iterator[tuple[int, str]]:
    family, _, _, _, index = _ADDRESS.unpack_from(message)
    if family not in (socket.AF_INET, socket.AF_INET6):
        return
    found: dict[int, memoryview] = {}
    rest = message[_ADDRESS.size :]
    while rest:
        length, kind = _ATTRIBUTE.unpack_from(rest)
        found[kind] = rest[_ATTRIBUTE.size : length]
        rest = rest[(length + 3) & ~3 :]
    own = found.get(_IFA_LOCAL, found.get(_IFA_ADDRESS))  # The other end's, where a device has but two.
    if own is not None:
        yield index, socket.inet_ntop(family, own)
