"""The native attention kernel by itself, against what the machine can read and multiply.

    python benchmarks/attention.py                      # the best instruction set here, 1 and 2 threads
    python benchmarks/attention.py --isa avx2

Decode: one token after 4,096, heads of 256, many layers in turn so that no cache holds their keys and values; the share
is that of a plain read of memory. Prefill: a prompt from its start, the share that of independent fused multiply-adds;
only pairs of a query and a key that it sees are counted.

Each figure, and each limit, is the best of three medians of the slowest thread's processor time: others may use the
machine at the same time, and waiting for them is not counted, though what they do to caches and memory is. With two
threads on a busy machine the two may not run at the same moment, and then share less than they would. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import machine
import numpy as np

HERE = Path(__file__).parent
PAGE = 64
ISAS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "portable": (),
}
SEGMENT = 16  # pages
MEMBERS = {"gemma-2-2b": (4, 2, 50.0), "gemma-2b": (1, 8, 0.0), "gemma-3-1b": (1, 4, 0.0)}  # kv heads, group, cap


class Attend(ctypes.Structure):
    _fields_ = [
        ("q", ctypes.c_void_p),
        ("q_stride", ctypes.c_int64),
        ("tokens", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("position", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("prefix", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


class Pages(ctypes.Structure):
    _fields_ = [("keys", ctypes.c_void_p), ("values", ctypes.c_void_p)]


class Partial(ctypes.Structure):
    _fields_ = [("most", ctypes.c_void_p), ("total", ctypes.c_void_p), ("sum", ctypes.c_void_p)]


def build(isa: str, folder: str) -> ctypes.CDLL:
    library = Path(folder) / "attention.so"
    flags = ("-std=c++20", "-O3", "-ffp-contract=off", "-fPIC", "-shared", f"-I{HERE.parent / 'csrc'}", *ISAS[isa])
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, *flags, str(HERE / "attention.cpp"), "-o", str(library)], check=True)
    lib = ctypes.CDLL(str(library))
    lib.read_all.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    lib.multiply.argtypes = [ctypes.c_int64]
    lib.attend_all.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 4, *[ctypes.c_void_p] * 4]
    lib.prefill.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_void_p] * 3]
    return lib


def timed(works: list[Callable[[], object]], rounds: int) -> float:
    """Seconds of the slowest thread, in its own processor time: the best of 3 medians of `rounds`."""
    medians = []
    for _ in range(3):
        times = []
        for _ in range(rounds):
            gate, seconds = threading.Barrier(len(works)), [0.0] * len(works)

            def run(i: int, gate: threading.Barrier = gate, seconds: list[float] = seconds) -> None:
                gate.wait()
                start = time.thread_time()
                works[i]()
                seconds[i] = time.thread_time() - start

            threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            times.append(max(seconds))
        medians.append(statistics.median(times))
    return min(medians)


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def partial(rows: int, head_dim: int) -> tuple[Partial, list[np.ndarray]]:
    held = [np.zeros(rows, np.float32), np.zeros(rows, np.float32), np.zeros(rows * head_dim, np.float32)]
    return Partial(*map(address, held)), held


class Heads:
    """Pages of random keys and values for many heads, which share nothing."""

    def __init__(self, count: int, positions: int, head_dim: int):
        pages = -(-positions // PAGE)
        one = np.random.default_rng(0).standard_normal(1 << 16, np.float32).astype(np.float16)
        self.data = np.resize(one, (count, pages, 2, PAGE * head_dim))
        base, step = address(self.data), PAGE * head_dim * 2
        at = base + step * np.arange(count * pages * 2, dtype=np.uint64).reshape(count, pages, 2)
        self.tables = np.ascontiguousarray(at.transpose(0, 2, 1))
        self.pages = (Pages * count)(*(Pages(address(table[0]), address(table[1])) for table in self.tables))


def scratch_bytes(rows: int, head_dim: int) -> int:
    return 4 * ((rows + 15) // 16 * 16 * head_dim + 2 * PAGE * (head_dim + 16) + 32 * (PAGE + 1)) + 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", choices=ISAS, default=None)
    parser.add_argument("--depth", type=int, default=4096)
    parser.add_argument("--tile", type=int, default=64, help="tokens of a prompt that are computed together")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompts", type=int, nargs="*", default=[512, 4096])
    args = parser.parse_args()
    has = machine.describe(1)["instructions"]
    isa = args.isa or ("avx512" if "avx512f" in has else "avx2" if "avx2" in has else "portable")
    rows: list[dict] = []
    before, own = machine.Moment.now(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        lib = build(isa, folder)
        for threads in args.threads:
            rows += measure(lib, threads, args.depth, args.tile, args.prompts)
    foreign = machine.Foreign()
    foreign.add(before, machine.Moment.now(), time.process_time() - own)
    print(f"others kept {foreign.cpus:.2f} CPUs busy meanwhile")
    about = machine.describe(max(args.threads)) | {"commit": machine.commit(), "foreign_cpus": round(foreign.cpus, 2)}
    print(json.dumps({"isa": isa, "machine": about, "rows": rows}))


def measure(lib: ctypes.CDLL, threads: int, depth: int, tile: int, prompts: list[int]) -> list[dict]:
    big = np.ones(1 << 26, np.float32)  # 256 MiB
    share = big.size // threads

    def reader(i: int) -> Callable[[], object]:
        return lambda: lib.read_all(address(big[i * share :]), share)

    read = big.nbytes / timed([reader(i) for i in range(threads)], 5) / 1e9
    steps = 20_000_000
    multiply = threads * steps * 6 * 32 / timed([lambda: lib.multiply(steps)] * threads, 3) / 1e9
    print(f"\n{threads} thread(s): reads {read:.1f} GB/s, multiplies {multiply:.0f} GFLOP/s")
    rows = []
    for name, (kv_heads, group, cap) in MEMBERS.items():
        for softcap in sorted({0.0, cap}):
            seconds, size = decode(lib, threads, depth, kv_heads, group, softcap)
            rate = size / seconds / 1e9
            rows.append({"what": f"decode {name}", "cap": softcap, "threads": threads, "ms": 1e3 * seconds,
                         "GB/s": rate, "share": rate / read})  # fmt: skip
            print(f"  decode at {depth:,}, {name:<10} cap {softcap:>2.0f}  {1e3 * seconds:6.3f} ms a layer "
                  f" {rate:5.1f} GB/s  {100 * rate / read:3.0f} % of reading", flush=True)  # fmt: skip
    for name, (kv_heads, group, cap) in MEMBERS.items():
        for tokens in prompts:
            seconds, operations = prompt(lib, threads, tokens, kv_heads, group, cap, tile)
            rate = operations / seconds / 1e9
            rows.append({"what": f"prefill {name}", "tokens": tokens, "cap": cap, "threads": threads,
                         "ms": 1e3 * seconds, "GFLOP/s": rate, "share": rate / multiply})  # fmt: skip
            print(f"  prefill of {tokens:>5,}, {name:<10} cap {cap:>2.0f}  {1e3 * seconds:7.2f} ms a layer "
                  f" {rate:5.1f} GFLOP/s  {100 * rate / multiply:3.0f} % of multiplying", flush=True)  # fmt: skip
    return rows


def decode(lib, threads: int, depth: int, kv_heads: int, group: int, softcap: float) -> tuple[float, int]:
    """Seconds of a layer, and the bytes of its keys and values."""
    head_dim, layers = 256, max(2, 160 * 2**20 // (kv_heads * depth * 256 * 4))
    heads = Heads(layers * kv_heads, depth, head_dim)
    q = np.random.default_rng(1).standard_normal(group * head_dim, np.float32)
    attend = Attend(address(q), q.size, 1, group, head_dim, depth - 1, 0, 0, head_dim**-0.5, softcap)
    works, held = [], []
    pages = depth // PAGE
    for thread in range(threads):
        # heads are divided, or the pages of a single one
        by_head = kv_heads % threads == 0
        part = len(heads.pages) // threads if by_head else len(heads.pages)
        first = thread * part if by_head else 0
        page0, page1 = (0, pages) if by_head else (thread * pages // threads, (thread + 1) * pages // threads)
        whole, keep = partial(group, head_dim)
        other, keep_too = partial(group, head_dim)
        out, scratch = np.zeros(group * head_dim, np.float32), np.zeros(scratch_bytes(group, head_dim), np.uint8)
        held += [keep, keep_too, out, scratch, whole, other]
        layers_heads = ctypes.addressof(heads.pages) + first * ctypes.sizeof(Pages)
        partials = ctypes.addressof(whole), ctypes.addressof(other)
        call = (
            ctypes.addressof(attend),
            layers_heads,
            part,
            page0,
            page1,
            SEGMENT,
            *partials,
            *map(address, (out, scratch)),
        )
        works.append(lambda call=call: lib.attend_all(*call))
    return timed(works, 5) / layers, kv_heads * depth * head_dim * 4


def prompt(lib, threads: int, tokens: int, kv_heads: int, group: int, softcap: float, tile: int) -> tuple[float, int]:
    """Seconds of a layer, and the operations on pairs that see each other. Each thread takes tiles of every head."""
    head_dim = 256
    heads = Heads(1, tokens, head_dim)
    q = np.random.default_rng(1).standard_normal(tokens * group * head_dim, np.float32)
    out = np.zeros_like(q)
    stride = group * head_dim
    held, works = [], []
    # a thread takes every so many-th tile, so that all have as much to do
    for thread in range(threads):
        p, keep = partial(tile * group, head_dim)
        scratch = np.zeros(scratch_bytes(tile * group, head_dim), np.uint8)
        calls = []
        for start in range(thread * tile, tokens, threads * tile):
            count = min(tile, tokens - start)
            at = 4 * start * stride
            a = Attend(address(q) + at, stride, count, group, head_dim, start, 0, 0, head_dim**-0.5, softcap)
            held.append(a)
            calls.append((ctypes.addressof(a), ctypes.addressof(heads.pages), tile, ctypes.addressof(p),
                          address(out) + at, address(scratch)))  # fmt: skip
        held += [p, keep, scratch]
        works.append(lambda calls=calls: [lib.prefill(*call) for call in calls])
    seconds = timed(works, 5 if tokens < 1000 else 1)
    return kv_heads * seconds, kv_heads * group * (tokens * (tokens + 1) // 2) * head_dim * 4


if __name__ == "__main__":
    main()
