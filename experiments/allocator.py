"""What glibc does with memory that XLA frees, on CPUs.

XLA allocates the buffers of a step when it begins and frees them when it ends. By default glibc
gives large ones back to the system at once, and the next step pays for every page of them again:
that took a third of the time of the gradient of small models, see docs/faq.md.
"""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of malloc.h
_KEPT = 2**30
_PAD = 2**26


def keep_freed_memory() -> bool:
    """Tells glibc to keep what is freed, up to 1 GiB at its end, for the whole process.

    Returns:
      Whether it was told: not where malloc is another's, or where the environment tunes it already
      (`MALLOC_*`, `GLIBC_TUNABLES`).
    """
    tuned = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if tuned or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    values = {_MMAP_THRESHOLD: _KEPT, _TRIM_THRESHOLD: _KEPT, _TOP_PAD: _PAD}
    return all(mallopt(option, value) for option, value in values.items())
