"""How much memory there is, and a limit that turns too little of it into an error that can be told."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

# of containers: version 2 of Linux's control groups, and version 1
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def free() -> int:
    """Bytes of memory that can be had without swapping; 8 GiB where the system does not tell."""
    free_now = _meminfo("MemAvailable") or _pages("SC_AVPHYS_PAGES") or 8 << 30
    return min(free_now, total() or free_now)


def total() -> int | None:
    """Bytes of memory that a process may come to hold, swap and a container's limit included; None where the system
    does not tell."""
    physical = _pages("SC_PHYS_PAGES")
    if physical is None:
        return None
    most = physical + (_meminfo("SwapTotal") or 0)
    for path in _LIMITS:
        with contextlib.suppress(OSError, ValueError):
            most = min(most, int(Path(path).read_text()))
    return most


def limit() -> None:
    """Let allocations beyond `total` fail in this process. Without a limit the system grants them and, when they are
    used, kills whoever holds most memory: no message, and what lies on disk stays there."""
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


def _pages(name: str) -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf(name)
    except (ValueError, OSError, AttributeError):
        return None


def _meminfo(name: str) -> int | None:
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path("/proc/meminfo").read_text().split(f"{name}:")[1].split()[0]) * 1024
    return None
