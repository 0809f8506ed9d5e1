"""Measure the memory, and limit this process to it, so that too little of it becomes an error with a message."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

# files with the limit of a container: version 2 of Linux's control groups, and version 1
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def free() -> int:
    """Return the bytes of memory that can be had without swapping; 8 GiB where the system does not tell."""
    free_now = _meminfo("MemAvailable") or _pages("SC_AVPHYS_PAGES") or 8 << 30
    return min(free_now, total() or free_now)


def total() -> int | None:
    """Return the bytes of memory that a process can have: with swap, and within a container's limit.

    None where the system does not tell."""
    physical = _pages("SC_PHYS_PAGES")
    if physical is None:
        return None
    most = physical + (_meminfo("SwapTotal") or 0)
    for path in _LIMITS:
        with contextlib.suppress(OSError, ValueError):
            most = min(most, int(Path(path).read_text()))
    return most


def limit() -> None:
    """Let allocations beyond `total` fail in this process.

    Without a limit the system grants them, and when they are used it kills the process that holds most memory. Then
    there is no message, and temporary files stay on the disk."""
    most = total()
    try:
        import resource
    except ImportError:  # not on Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if most is None or soft != resource.RLIM_INFINITY:
        return
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def forget_peak() -> None:
    """Let the most memory that this process took be counted anew, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _pages(name: str) -> int | None:
    """Return the bytes of the pages that os.sysconf counts under a name; None where it does not."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf(name)
    except (ValueError, OSError, AttributeError):
        return None


def _meminfo(name: str) -> int | None:
    """Return the bytes that Linux's /proc/meminfo gives under a name; None where it gives none."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path("/proc/meminfo").read_text().split(f"{name}:")[1].split()[0]) * 1024
    return None
