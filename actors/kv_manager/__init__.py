"""The KV manager: one per device, the owner of its pool."""

from .manager import KvManager

__all__ = ["KvManager"]
