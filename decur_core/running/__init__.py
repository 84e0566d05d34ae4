"""Run folders, records, checkpoints, processes: what keeps long work safe."""

import ctypes
import signal
import sys

_libc = ctypes.CDLL(None)  # loaded before a fork, after which not everything is safe


def tie() -> None:
    """Die with the process that started this one, whatever kills it (Linux); fit for a ``preexec_fn``."""
    if sys.platform == "linux":
        _libc.prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
