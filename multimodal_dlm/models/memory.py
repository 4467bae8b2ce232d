"""Process memory during CPU training."""

import ctypes
import logging
import sys

logger = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed memory for the next step; True if it agreed.

    A CPU training step frees and allocates the same few hundred megabytes; by default glibc returns
    them to the kernel, which then faults in 120,000 zeroed pages a step (12 M parameters, 64 x 96
    tokens). The setting lasts for the process; call it once, before the first step. It does
    nothing where the C library is not glibc.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = (
        (_M_MMAP_THRESHOLD, 32 << 20),
        (_M_TRIM_THRESHOLD, 2**31 - 1),
        (_M_TOP_PAD, 64 << 20),
    )
    is_set = all(mallopt(name, value) == 1 for name, value in settings)
    if not is_set:
        logger.warning("glibc refused the settings that keep freed memory; steps may be slower.")
    return is_set
