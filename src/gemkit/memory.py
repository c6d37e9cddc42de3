"""What this process may use of the machine: memory in bytes, and processors.

Containers set limits by control groups, which the machine's own figures know nothing of: those of this process' group
and of all groups around it count, of version 2 and of version 1.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_PROC, _GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def available_memory() -> int | None:
    """Bytes that a process can take without swapping, within the limits of its groups; None where the system does not
    say."""
    try:
        text = (_PROC / "meminfo").read_text(encoding="ascii")
        found = [int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable:")]
        free = found[0] if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None
    return min([free, *_left_in_groups()])


def processors() -> int:
    """Processors that this process may use: by its affinity, and by the quotas of its groups, rounded up."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([count, *(max(1, -(-quota // period)) for quota, period in _quotas())])


def resident_memory() -> int | None:
    """Bytes that this process occupies now, pages of mapped files among them; None where the system does not say."""
    try:
        return int((_PROC / "self" / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def peak_memory() -> int:
    """Bytes that this process occupied at most so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _left_in_groups() -> Iterator[int]:
    """Bytes that each group with a limit has left. Pages of files that nobody uses are given back when memory is
    wanted, so they count as free."""
    for folder in _groups("memory"):
        for limit, used, unused in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            try:
                most, taken = int((folder / limit).read_text()), int((folder / used).read_text())
            except (OSError, ValueError):  # no such group, or "max"
                continue
            yield max(0, most - taken + _stat(folder / "memory.stat", unused))


def _stat(path: Path, name: str) -> int:
    try:
        return int(dict(line.split() for line in path.read_text().splitlines())[name])
    except (OSError, ValueError, KeyError):
        return 0


def _quotas() -> Iterator[tuple[int, int]]:
    """Microseconds of processors in each period of microseconds, of each group with a quota."""
    for folder in _groups("cpu"):
        for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
            try:
                quota, period = map(int, " ".join((folder / name).read_text() for name in names).split())
            except (OSError, ValueError):
                continue
            if quota > 0 and period > 0:  # -1 is none
                yield quota, period


def _groups(controller: str) -> Iterator[Path]:
    """The folders of this process' group and of those around it.

    In a container the path is often that of the machine outside, while the group is mounted as the root: what is not
    there is passed over by the readers.
    """
    try:
        lines = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, names, path = line.split(":", 2)
        if number == "0" and not names:
            root = _GROUPS
        elif controller in names.split(","):
            root = _GROUPS / controller
        else:
            continue
        folder = root / path.lstrip("/")
        yield folder
        while folder != root and root in folder.parents:
            folder = folder.parent
            yield folder
