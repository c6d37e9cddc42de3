"""One engine in a process of its own: `python worker.py ENGINE THREADS`, JSON lines in, JSON lines out.

Every engine shows the same three calls: `load` a GGUF, `start` on the ids of a prompt, and `next`; the latter two give
the greedy next token, computed and known. So the clock below is the same clock around the same work for all of them.

Runs in whatever environment the engine is installed in, so nothing but the engine itself and NumPy is imported.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Engine(ABC):
    """What is measured.

    Attributes:
        about: version and settings, for the reader of a result.
        weight_bytes: bytes of weights that a decoded token reads, as they are in memory; known once it is loaded.
    """

    about: str
    weight_bytes: int

    @abstractmethod
    def load(self, path: str, context: int) -> None:
        """Open a GGUF, to run sequences of up to `context` tokens."""

    @abstractmethod
    def start(self, ids: Sequence[int]) -> int:
        """The token after a prompt, computed from nothing."""

    @abstractmethod
    def next(self) -> int:
        """The token after the one that was given last."""


class Ours(Engine):
    """gemkit as `gemkit.load` gives it, through the loop that answers users: sampler and text included."""

    def __init__(self, threads: int, **options: Any):
        import torch

        import gemkit

        torch.set_num_threads(threads)
        self._gemkit, self._options = gemkit, options
        chosen = ", ".join(f"{key}={value}" for key, value in options.items()) or "default settings"
        self.about = f"gemkit {gemkit.__version__}, torch {torch.__version__}; {chosen}"

    def load(self, path: str, context: int) -> None:
        self._model = self._gemkit.load(path, **self._options)
        self.weight_bytes = self._model.report.nbytes
        dtype = self._model.report.dtype
        self.about += f"; executor {self._model.executor.name}, run dtype {dtype}"

    def start(self, ids: Sequence[int]) -> int:
        from gemkit.generate import Request, generate

        self._events = generate(self._model.executor, [Request(ids)], **self._model.loop_options({}))
        return self.next()

    def next(self) -> int:
        token = next(self._events).id
        assert token is not None, "the answer ended before its work was done"
        return token


class LlamaCpp(Engine):
    """llama.cpp through its C API: no sampler, no text, and the settings that its own command line ships with."""

    def __init__(self, threads: int):
        import llama_cpp

        self._api, self._threads = llama_cpp, threads
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)  # held here, for the library keeps only a pointer
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        build = llama_cpp.llama_print_system_info().decode().strip(" |")
        self.about = f"llama.cpp of llama-cpp-python {llama_cpp.__version__}; {build}"

    def load(self, path: str, context: int) -> None:
        api = self._api
        model_params = api.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = api.llama_model_load_from_file(os.fsencode(path), model_params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        params = api.llama_context_default_params()
        params.n_ctx = context
        params.n_threads = params.n_threads_batch = self._threads
        params.swa_full = False  # as its command line sets it: a sliding layer remembers its window alone
        self._context = api.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {context} tokens")
        self._batch = params.n_batch
        self._vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self.weight_bytes = api.llama_model_size(self._model)

    def start(self, ids: Sequence[int]) -> int:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), False)  # forget, do not erase
        for first in range(0, len(ids), self._batch):
            self._decode(ids[first : first + self._batch])
        return self._best()

    def next(self) -> int:
        self._decode([self._token])
        return self._best()

    def _decode(self, ids: Sequence[int]) -> None:
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        if code := self._api.llama_decode(self._context, self._api.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError(f"llama_decode returned {code}")

    def _best(self) -> int:
        logits = self._api.llama_get_logits_ith(self._context, -1)
        self._token = int(np.ctypeslib.as_array(logits, (self._vocab,)).argmax())
        return self._token


class Transformers(Engine):
    """Transformers, which makes a GGUF's weights dense, through the forward pass: no sampler, no text."""

    def __init__(self, threads: int, dtype: str):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self._torch, self._transformers, self._dtype = torch, transformers, dtype
        self.about = f"transformers {transformers.__version__}, torch {torch.__version__}; dtype={dtype}"

    def load(self, path: str, context: int) -> None:
        folder, name = os.path.split(path)
        dtype = getattr(self._torch, self._dtype)
        load = self._transformers.AutoModelForCausalLM.from_pretrained
        self._model = load(folder, gguf_file=name, dtype=dtype).eval()
        self.weight_bytes = sum(weight.nbytes for weight in self._model.parameters())  # a tied head is listed once
        self.about += f"; attention {self._model.config._attn_implementation}"

    def start(self, ids: Sequence[int]) -> int:
        self._cache = None
        return self._forward(ids)

    def next(self) -> int:
        return self._forward([self._token])

    def _forward(self, ids: Sequence[int]) -> int:
        with self._torch.inference_mode():
            answer = self._model(
                self._torch.tensor([ids]), past_key_values=self._cache, use_cache=True, logits_to_keep=1
            )
        self._cache = answer.past_key_values
        self._token = int(answer.logits[0, -1].argmax())
        return self._token


ENGINES = {
    "gemkit": lambda threads: Ours(threads),
    "gemkit-dense": lambda threads: Ours(threads, quantized=False),
    "llama.cpp": lambda threads: LlamaCpp(threads),
    "transformers-float32": lambda threads: Transformers(threads, "float32"),
    "transformers-bfloat16": lambda threads: Transformers(threads, "bfloat16"),
}


class Measured:
    """An engine, and the clock around it. A public method is a request; what it returns is the answer."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def load(self, path: str, context: int) -> dict[str, Any]:
        """From opening the file to the first token of a prompt of one, for some engines read as late as that."""
        start = time.perf_counter()
        self._engine.load(path, context)
        self._engine.start([2])  # <bos>
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "about": self._engine.about, "weight_bytes": self._engine.weight_bytes}

    def prompt(self, ids: list[int]) -> dict[str, Any]:
        """From nothing to the token after the prompt."""
        start = time.perf_counter()
        self._engine.start(ids)
        return {"seconds": time.perf_counter() - start}

    def decode(self, ids: list[int], tokens: int) -> dict[str, Any]:
        """`tokens` more after the prompt's first; the prompt is not timed."""
        drawn = [self._engine.start(ids)]
        start = time.perf_counter()
        drawn += [self._engine.next() for _ in range(tokens)]
        return {"seconds": time.perf_counter() - start, "drawn": drawn}

    def peak(self) -> dict[str, Any]:
        """The most memory that the process ever held, pages of mapped files among it."""
        return {"bytes": peak_memory()}


class Memory:
    """What memory gives: a matrix far larger than any cache, times a vector, which reads it once from end to end."""

    def __init__(self, threads: int):
        # float32 products by OpenBLAS, whose threads are those of the environment that the runner has set
        self._matrix = np.full((32_768, 4_096), 0.5, np.float32)  # 512 MiB
        self._vector = np.ones(4_096, np.float32)
        self._out = np.empty(32_768, np.float32)

    def read(self, passes: int) -> dict[str, Any]:
        """The seconds of the best pass: a limit is what can be reached."""
        best = float("inf")
        for _ in range(passes):
            start = time.perf_counter()
            np.dot(self._matrix, self._vector, out=self._out)
            best = min(best, time.perf_counter() - start)
        return {"seconds": best, "bytes": self._matrix.nbytes}


def peak_memory() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


def main() -> None:
    # What libraries print must not get between the answers: stdout becomes stderr, the answers keep the real one.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    name, threads = sys.argv[1], int(sys.argv[2])
    try:
        worker = Memory(threads) if name == "memory" else Measured(ENGINES[name](threads))
        answer({"imported_bytes": peak_memory()})
        for line in sys.stdin:
            request = json.loads(line)
            before = time.process_time()
            done = getattr(worker, request.pop("do"))(**request)
            answer({**done, "cpu_seconds": time.process_time() - before})
    except Exception as error:  # whatever goes wrong in a rival is told in words, and its rows are absent
        answer({"error": f"{type(error).__name__}: {error}"})
        raise


if __name__ == "__main__":
    main()
