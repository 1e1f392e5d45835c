"""Where an actor is: the node's name, the endpoint its ROUTER is bound to, and the actor's name on it."""

import msgspec


class Address(msgspec.Struct, frozen=True, array_like=True, order=True):
    """An actor's place on the bus. ``endpoint`` is a transport's own, such as ``ipc:///run/x.sock``."""

    node: str
    endpoint: str
    actor: str

    def __str__(self) -> str:
        return f"{self.actor}@{self.node}"
