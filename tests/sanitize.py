"""The native executor under sanitizers: `make sanitize`, `make sanitize-threads`.

    python tests/sanitize.py memory     builds the library with AddressSanitizer and UndefinedBehaviorSanitizer
    python tests/sanitize.py threads    or with ThreadSanitizer, and runs every part below with it
    python tests/sanitize.py KIND DIR   (what these start) runs models that were packed into DIR

Models of every member at test size, dense and quantized, are packed by the ordinary library. A process with the
sanitizers in front then runs them, without torch: prompts in chunks, batches, windows, spans, drafts taken back,
snapshots, filtered heads, calls of several threads, damaged programs. Anything that a sanitizer finds ends it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Sanitizers:
    flags: str
    library: str  # to be loaded before everything else
    environment: dict[str, str]
    isas: tuple[str, ...]
    start: tuple[str, ...] = ()  # what the process is started by


KINDS = {
    "memory": Sanitizers(
        "-fsanitize=address,undefined -fno-sanitize-recover=all",
        "libasan.so",
        {"ASAN_OPTIONS": "detect_leaks=0"},  # Python itself leaves memory behind
        ("portable", "avx2", "avx512"),
    ),
    "threads": Sanitizers(
        "-fsanitize=thread",
        "libtsan.so",
        {"TSAN_OPTIONS": "halt_on_error=1", "GEMKIT_THREADS": "3"},
        ("avx2", "avx512"),  # the same threads as with portable kernels, which would take an hour
        ("setarch", "-R"),  # its shadow memory has fixed places, which random ones of the kernel's get in the way of
    ),
}


def main() -> int:
    kind, *folder = sys.argv[1:] or ["memory"]
    if folder:
        run_all(Path(folder[0]), kind)
        return 0
    sanitizers = KINDS[kind]
    with tempfile.TemporaryDirectory() as work:
        build, models = Path(work) / "build", Path(work) / "models"
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release", "-DGK_OPTIMISE=-O1"]
        flags = f"-DCMAKE_CXX_FLAGS={sanitizers.flags} -fno-omit-frame-pointer -g1"
        subprocess.run([*configure, flags], check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", "2"], check=True)
        models.mkdir()
        pack_all(models)
        (library,) = build.rglob("libgemkit_native.so")
        asked = ["c++", f"-print-file-name={sanitizers.library}"]
        before = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
        env = {**os.environ, **sanitizers.environment, "LD_PRELOAD": before, "GEMKIT_NATIVE": str(library)}
        for isa in sanitizers.isas:
            command = [*sanitizers.start, sys.executable, __file__, kind, str(models)]
            done = subprocess.run(command, env={**env, "GEMKIT_ISA": isa})
            print(f"{isa}: " + ("clean, or not on this machine" if done.returncode == 0 else "FAILED"), flush=True)
            if done.returncode:
                return 1
    return 0


def pack_all(folder: Path) -> None:
    """Every member at test size, and one whose head is screened."""
    from gemkit.executors.native.packer import pack

    sys.path.insert(0, str(Path(__file__).parent))
    from support.native_models import MEMBERS, randomised

    made = {name: randomised(name) for name in MEMBERS}
    made |= {f"{name}-q8_0": randomised(name, quantized=True) for name in ("gemma-2-2b", "gemma-3-1b")}
    for name, module in made.items():
        pack(module, folder / f"{name}.gkpack")
        (folder / f"{name}.txt").write_text(repr(module.config))


def run_all(folder: Path, kind: str) -> None:
    """What a process with the sanitizers does. It must not import torch, which they take too long for."""
    from gemkit import family
    from gemkit.errors import ConfigError
    from gemkit.executors.native import library as native
    from gemkit.executors.native.executor import NativeExecutor
    from gemkit.executors.native.packfile import Pack

    try:
        able, why = native.available()
    except ConfigError as error:
        able, why = False, str(error)
    if not able:
        print(why)
        return
    # an array of 16 floats that is checked at every step takes a minute for what a register does in a second
    names = "gemma-3-1b-q8_0", "recurrentgemma-2b"
    paths = sorted(folder.glob("*.gkpack"))
    for path in paths if why != "portable" else [folder / f"{name}.gkpack" for name in names]:
        decoder = eval(path.with_suffix(".txt").read_text(), vars(family))  # our own words, of a moment ago
        exercise(NativeExecutor(decoder, Pack(path)), 1 if kind == "memory" and why != "portable" else 4)
        if kind == "memory":
            damage(decoder, path)
    pack_random()
    assert "torch" not in sys.modules


def exercise(executor, less: int) -> None:
    """Everything that an executor and its state do, with so many times fewer tokens."""
    from gemkit.errors import StateError
    from gemkit.executors.interface import Chunk
    from gemkit.generate.sampler import Sampling, logits_filter

    rng = np.random.default_rng(0)
    ids = rng.integers(0, executor.decoder.vocab_size, 400).tolist()
    state = executor.new_state(3)
    long, short = ids[: 136 // less], ids[: 76 // less]
    end = len(short)
    spans = [] if executor.decoder.recurrent else [(0, end // 2), (end // 2 + 1, end)]
    some = logits_filter(Sampling(), ids)
    executor.run([Chunk(0, long, rows=3), Chunk(1, ids[:1]), Chunk(2, short, spans=spans)], state)
    executor.run([Chunk(0, ids[130:131]), Chunk(2, ids[77:80], rows=2, filter=some)], state)
    before = state.snapshot(0)
    executor.run([Chunk(0, ids[131:136], rows=5)], state, output="pooled")
    state.restore(before, 0, keep=2)
    state.restore(before, 1)
    for token in ids[: 72 // less]:
        executor.run([Chunk(0, [token], filter=some), Chunk(1, [token])], state)
        executor.run([Chunk(2, [token], filter=some)], state)
    with contextlib.suppress(StateError):
        state.restore(before, 0, keep=30)
    with tempfile.TemporaryDirectory() as folder:
        saved = before.save(Path(folder) / "snapshot")
        executor.new_state().restore(state.load(saved))
    state.free(0)
    assert state.nbytes > state.unique(before)
    executor.run([Chunk(state.add(), ids[: 400 // less])], state)
    together(executor, ids[: 40 // less])


def pack_random() -> None:
    """Weights of every kind, of any bits, from files and memory to both, with sketches; files that are cut."""
    import ctypes

    from gemkit.block_types import KINDS as BLOCK_TYPES
    from gemkit.executors.native import screening
    from gemkit.executors.native.library import library
    from gemkit.executors.native.packfile import KINDS
    from gemkit.executors.native.writer import Source, Target

    rng, native = np.random.default_rng(2), library(free=True)

    def pack(kind: str, rows: int, cols: int, source: Source, sketched: bool) -> int:
        signs = screening.signs(cols)
        number = KINDS.index(kind)
        nbytes = native.gk_packed_bytes(number, rows, cols)
        sums, error, results = (ctypes.c_uint64 * 2)(), ctypes.c_int32(), set()
        packed = np.empty(nbytes + screening.nbytes(rows, cols), np.uint8)
        with tempfile.TemporaryFile() as file:
            for place, memory in ((file.fileno(), None), (-1, packed.ctypes.data)):
                target = Target(memory, 0, nbytes, signs.ctypes.data if sketched else None, place)
                to = ctypes.byref(source), ctypes.byref(target)
                cut = rows // 32 * 16
                for first, last in ((0, cut), (cut, rows)):
                    given = 3, number, rows, cols, *to, first, last, sums, ctypes.byref(error)
                    results.add(native.gk_pack(*given))
        return max(results)

    for kind in KINDS:
        block_type = BLOCK_TYPES.get(kind)
        for rows in (1, 16, 53):
            cols = 512 if block_type else 70
            names = block_type.layout(rows, cols) if block_type else {"dense": ((rows, cols), kind)}
            dtypes = {"bfloat16": "uint16"}
            planes = {
                name: rng.integers(0, 16 if name in ("scales", "mins") else 256, size, np.uint8)  # some have 4 bits
                for name, (shape, dtype) in names.items()
                for size in [shape[0] * shape[1] * np.dtype(dtypes.get(dtype, dtype)).itemsize]
            }
            sketched = cols % 32 == 0  # as heads have it
            stored = {"bfloat16": "BF16"}.get(kind, "F32")
            in_memory = Source.memory({name: plane.ctypes.data for name, plane in planes.items()}, planes, stored)
            assert pack(kind, rows, cols, in_memory, sketched) == 0, kind
            with tempfile.TemporaryFile() as file:
                places, at = {}, 0
                for name, plane in planes.items():
                    places[name] = file.fileno(), at
                    at += file.write(plane.tobytes())
                file.flush()
                assert pack(kind, rows, cols, Source.of_files(places, stored), sketched) == 0, kind
                file.truncate(at - 1)
                assert pack(kind, rows, cols, Source.of_files(places, stored), sketched) == 2, kind
            block_bytes = native.gk_block_bytes(KINDS.index(kind))
            if block_bytes:
                with tempfile.TemporaryFile() as file:
                    blocks = rows * cols // block_type.row_multiple * block_bytes
                    file.write(rng.bytes(blocks))
                    file.flush()
                    assert pack(kind, rows, cols, Source.blocks(file.fileno(), 0), sketched) == 0, kind
                    file.truncate(blocks - 1)
                    assert pack(kind, rows, cols, Source.blocks(file.fileno(), 0), sketched) == 2, kind


def together(executor, ids: list[int]) -> None:
    """Calls of several threads at once, on one state and on their own, one of them stopped; snapshots come and go."""
    from gemkit.errors import Stopped
    from gemkit.executors.interface import Chunk, LogitsFilter, StopFlag

    shared, flag = executor.new_state(4), StopFlag()
    executor.run([Chunk(0, ids)], shared)
    before = shared.snapshot(0)

    def work(i: int) -> None:
        own = executor.new_state(1)
        for token in ids[:6]:
            executor.run([Chunk(i, [token], filter=LogitsFilter(2))], shared)
            executor.run([Chunk(0, [token])], own)
            shared.restore(before, i)
            shared.snapshot(i)
        with contextlib.suppress(Stopped):
            executor.run([Chunk(0, ids * 3)], own, stop=flag)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    flag.set()
    for thread in threads:
        thread.join()


def damage(decoder, path: Path) -> None:
    """Programs with a wrong word: refused, or run within their bounds."""
    from gemkit.errors import ModelError
    from gemkit.executors.native.executor import NativeExecutor
    from gemkit.executors.native.packfile import Pack
    from gemkit.generate import Chunk

    rng = np.random.default_rng(1)
    for _ in range(40):
        pack = Pack(path)
        name = rng.choice(["steps", "buffers"])
        array = getattr(pack, name).copy()
        row, column = rng.integers(array.shape[0]), rng.integers(array.shape[1])
        array[row, column] = rng.choice([-1, 0, 1, 7, 2**31 - 1, -(2**31), int(rng.integers(-100, 10_000))])
        setattr(pack, name, array)
        with contextlib.suppress(ModelError):
            executor = NativeExecutor(decoder, pack)
            executor.run([Chunk(0, [1, 2, 3], rows=2)], executor.new_state(1))


if __name__ == "__main__":
    sys.exit(main())
