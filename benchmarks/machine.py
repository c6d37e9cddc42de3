"""What a measurement ran on, and what else ran there meanwhile. Linux: it reads /proc."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TICK = os.sysconf("SC_CLK_TCK")


def describe(threads: int) -> dict[str, Any]:
    """The hardware, and the environment variables that change how threads wait and memory is laid out."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", cpuinfo, re.M)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.M)
    known = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")
    has = set(flags.group(1).split()) if flags else set()
    return {
        "cpu": model.group(1).strip() if model else platform.machine(),
        "instructions": [name for name in known if name in has],
        "cpus": len(os.sched_getaffinity(0)),
        "threads": threads,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": f"{platform.system()} {platform.release()}, {platform.libc_ver()[0]} {platform.libc_ver()[1]}",
        "python": platform.python_version(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if re.match(r"(OMP|GOMP|KMP|MKL|OPENBLAS)_", k)},
    }


def limits_library(cache: Path) -> Path:
    """limits.c, compiled for this very processor into a cache.

    Raises:
        OSError, subprocess.CalledProcessError: if there is no C compiler, or it fails.
    """
    source = Path(__file__).with_name("limits.c")
    name = hashlib.sha256(source.read_bytes() + describe(1)["cpu"].encode()).hexdigest()[:12]
    library = cache / f"limits-{name}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        work = library.with_suffix(f".{os.getpid()}")
        flags = ["-O3", "-march=native", "-shared", "-fPIC"]
        subprocess.run(["cc", *flags, source, "-o", work], check=True, capture_output=True)
        os.replace(work, library)
    return library


def commit() -> str:
    """The commit that is measured, and whether anything was changed since."""
    here = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + (" with uncommitted changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown: not a git checkout"


@dataclass(frozen=True)
class Moment:
    """CPU time of the whole machine up to a moment, in seconds summed over CPUs."""

    clock: float
    busy: float
    stolen: float  # the hypervisor ran something else

    @classmethod
    def now(cls) -> Moment:
        line = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0]
        user, nice, system, _, _, irq, softirq, steal = (int(x) / _TICK for x in line.split()[1:9])
        return cls(time.perf_counter(), user + nice + system + irq + softirq, steal)


@dataclass
class Foreign:
    """CPU time that was not the measured process's, over the pieces of work that were timed."""

    seconds: float = 0.0
    busy: float = 0.0
    stolen: float = 0.0

    def add(self, before: Moment, after: Moment, own: float) -> None:
        self.seconds += after.clock - before.clock
        self.busy += after.busy - before.busy - own
        self.stolen += after.stolen - before.stolen

    @property
    def cpus(self) -> float:
        """How many CPUs others kept busy, on average."""
        return max(0.0, self.busy / self.seconds) if self.seconds else 0.0

    @property
    def stolen_cpus(self) -> float:
        return self.stolen / self.seconds if self.seconds else 0.0
