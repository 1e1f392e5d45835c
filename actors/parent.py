"""The tie of a process to the one that started it, kept by the kernel."""

import ctypes
import signal

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def die_with_parent() -> None:
    """Have the kernel kill this process in the moment its parent's starting thread ends, even if its loop hangs."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
