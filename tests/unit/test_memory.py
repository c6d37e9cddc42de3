"""Memory that is taken, as the system tells it, and the limits of containers, in trees of files."""

import os

import numpy as np
import pytest

from gemkit import memory
from gemkit.memory import available_memory, peak_memory, processors, resident_memory


def test_memory_that_is_taken_is_seen():
    before, peak = resident_memory(), peak_memory()
    assert before is not None
    assert before <= peak + (1 << 20)
    taken = np.ones(256 << 17)  # 256 MiB, each page written to
    assert 250 << 20 < resident_memory() - before < 270 << 20
    assert peak_memory() >= before + (250 << 20)
    del taken


def test_a_system_that_does_not_say(monkeypatch, tmp_path):
    available = available_memory()
    assert available is not None
    assert available > 1 << 20
    monkeypatch.setattr(memory, "_PROC", tmp_path)
    assert available_memory() is None
    assert resident_memory() is None
    assert processors() == len(os.sched_getaffinity(0))


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with 64 GiB free and 64 processors, in these control groups."""

    def machine(groups: str, files: dict[str, str]):
        files = {"proc/self/cgroup": groups, "proc/meminfo": f"MemAvailable: {64 << 20} kB\n", **files}
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    return machine


GIB = 1 << 30


def test_a_machine_without_limits(machine):
    machine("0::/user.slice\n", {"cgroup/user.slice/memory.max": "max\n", "cgroup/user.slice/cpu.max": "max 100000\n"})
    assert (available_memory(), processors()) == (64 * GIB, 64)


def test_the_smallest_limit_of_groups_around_one_another(machine):
    machine(
        "0::/pod/container\n",
        {
            "cgroup/pod/memory.max": f"{4 * GIB}\n",
            "cgroup/pod/memory.current": f"{3 * GIB}\n",
            "cgroup/pod/memory.stat": f"anon 1\ninactive_file {GIB}\n",
            "cgroup/pod/container/memory.max": f"{8 * GIB}\n",
            "cgroup/pod/container/memory.current": "0\n",
            "cgroup/pod/cpu.max": "max 100000\n",
            "cgroup/pod/container/cpu.max": "150000 100000\n",
        },
    )
    assert (available_memory(), processors()) == (2 * GIB, 2)  # a processor and a half is used by two threads


def test_a_container_that_sees_its_group_as_the_root(machine):
    """Version 1, with the path of the machine outside."""
    machine(
        "11:cpu,cpuacct:/docker/0123\n9:memory:/docker/0123\n",
        {
            "cgroup/memory/memory.limit_in_bytes": f"{GIB}\n",
            "cgroup/memory/memory.usage_in_bytes": f"{GIB // 2}\n",
            "cgroup/cpu/cpu.cfs_quota_us": "50000\n",
            "cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    assert (available_memory(), processors()) == (GIB // 2, 1)


def test_more_used_than_allowed_leaves_nothing(machine):
    machine("0::/\n", {"cgroup/memory.max": "10", "cgroup/memory.current": "20", "cgroup/cpu.max": "-1 100000"})
    assert (available_memory(), processors()) == (0, 64)
