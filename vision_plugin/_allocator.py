"""Keep the C library's allocator from giving memory back while a model runs."""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MOST = 2**31 - 1
_USUAL = {_M_MMAP_THRESHOLD: 32 * 2**20, _M_TRIM_THRESHOLD: 64 * 2**20}
"""Values that glibc reaches by itself in a process that freed large tensors, see mallopt(3)."""
_lock, _depth = threading.Lock(), 0


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep freed memory in the process for reuse, and give it back to the system at the end.

    By default glibc hands large blocks back to the system when they are freed. A model that runs on
    the CPU frees and allocates the same blocks at every layer, and the system clears each of their
    pages anew, which takes up to a quarter of a forward pass. Extraction, evaluation, reports and
    steerability run in such a block, wherever the model is: memory of a GPU is not affected, and
    batches of images and what comes back from a GPU are freed and allocated here, too. This does
    nothing with another C library, or where the environment configures the allocator. Blocks may
    be nested: the outermost gives the memory back.
    """
    global _depth
    if not _may_be_set():
        yield
        return
    libc = ctypes.CDLL(None)
    with _lock:
        _depth += 1
        for option in _USUAL:
            libc.mallopt(option, _MOST)
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if not _depth:
                for option, value in _USUAL.items():
                    libc.mallopt(option, value)
                libc.malloc_trim(0)


def _may_be_set() -> bool:
    configured = any(name.startswith("MALLOC_") for name in os.environ)
    configured |= "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    return platform.libc_ver()[0] == "glibc" and not configured
