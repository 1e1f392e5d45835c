"""Callboard's actors. Only the messages are imported here: the rest may be heavy."""

from . import protocol

__all__ = ["protocol"]
