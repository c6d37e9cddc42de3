"""One engine in a process of its own: `python worker.py ENGINE THREADS`, JSON lines in, JSON lines out.

Every engine shows the same calls: `load` a model, `start` on the ids of one prompt or several, and `next`; the latter
two give the greedy next token of each sequence, computed and known. So the clock below is the same clock around the
same work for all of them.

Runs in whatever environment the engine is installed in, so nothing but the engine itself and NumPy is imported.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

CACHE = Path(os.environ.get("GEMKIT_BENCH_CACHE", Path(__file__).parents[1] / ".cache" / "bench"))
Prompts = Sequence[Sequence[int]]


class Engine(ABC):
    """What is measured.

    Attributes:
        about: version and settings, for the reader of a result.
        weight_bytes: bytes of weights that a decoded token reads, as they are in memory; known once it is loaded.
    """

    about: str
    weight_bytes: int

    @abstractmethod
    def load(self, path: str, context: int, sequences: int = 1, **settings: Any) -> None:
        """Open a model, to run so many sequences of up to `context` tokens each.

        Args:
            settings: what the runner may choose of an engine, to find its best; each engine has its own.
        """

    @abstractmethod
    def start(self, prompts: Prompts) -> list[int]:
        """The token after each prompt, computed from nothing."""

    @abstractmethod
    def next(self) -> list[int]:
        """The tokens after those that were given last."""

    def fill(self, depth: int) -> None:
        """Make a memory of one sequence of `depth` random tokens, which `resume` goes on from."""
        raise NotImplementedError(f"{self.about} is not measured at depth")

    def resume(self) -> None:
        """Be at the end of what `fill` made, again and again, with one token to go on from."""
        raise NotImplementedError


class Ours(Engine):
    """gemkit as `gemkit.load` gives it, through the loop that answers users: sampler and text included."""

    def __init__(self, threads: int, **options: Any):
        import torch

        import gemkit

        torch.set_num_threads(threads)
        self._gemkit, self._options = gemkit, options
        chosen = ", ".join(f"{key}={value}" for key, value in options.items()) or "default settings"
        self.about = f"gemkit {gemkit.__version__}, torch {torch.__version__}; {chosen}"

    def load(self, path: str, context: int, sequences: int = 1, **settings: Any) -> None:
        self._model = self._gemkit.load(path, **self._options)
        self.weight_bytes = self._model.report.nbytes
        dtype = self._model.report.dtype
        self.about += f"; executor {self._model.executor.name}, run dtype {dtype}"

    def start(self, prompts: Prompts) -> list[int]:
        from gemkit.generate import Request, generate

        requests = [Request(ids) for ids in prompts]
        self._events = generate(self._model.executor, requests, text_stream=self._model.tokenizer.stream)
        self._count = len(prompts)
        return self.next()

    def next(self) -> list[int]:
        tokens = [next(self._events).id for _ in range(self._count)]
        assert None not in tokens, "an answer ended before its work was done"
        return tokens


class Bare(Engine):
    """gemkit's executor and the index of the largest logit: no sampler, no text, as the rivals are called."""

    def __init__(self, threads: int, **options: Any):
        self._options = options  # threads: the environment of this process says how many
        self.about = "gemkit"

    def vocabulary(self, path: str) -> None:
        """The tokenizer and nothing else, as a process has it that only counts tokens."""
        from gemkit.weights.checkpoint import find

        with find(path) as checkpoint:
            self._tokenizer = checkpoint.tokenizer

    def load(self, path: str, context: int, sequences: int = 1, **settings: Any) -> None:
        import gemkit
        from gemkit.generate import Chunk, Sampling
        from gemkit.generate.sampler import logits_filter
        from gemkit.weights import hub

        self._chunk = Chunk
        # random weights say nothing of which rows of the table can be left out: their head is read in full
        self._filter = logits_filter(Sampling(), ()) if Path(path) == hub.starter() else None
        options = {**self._options, **settings}
        model = gemkit.load(path, **options)
        self._executor = model.executor
        self.weight_bytes = model.report.nbytes
        chosen = ", ".join(f"{key}={value}" for key, value in options.items()) or "default settings"
        self.about = f"gemkit {gemkit.__version__}, executor {model.executor.name}; {chosen}"

    def start(self, prompts: Prompts) -> list[int]:
        self._state = self._executor.new_state(len(prompts))
        self._slots = range(len(prompts))
        return self._best([self._next_of(slot, list(ids)) for slot, ids in zip(self._slots, prompts, strict=True)])

    def next(self) -> list[int]:
        return self._best([self._next_of(slot, [token]) for slot, token in zip(self._slots, self._tokens, strict=True)])

    def fill(self, depth: int) -> None:
        self._state = self._executor.new_state(2)
        fill(self._executor, self._state, depth)

    def resume(self) -> None:
        self._state.restore(self._state.snapshot(0), 1)
        self._slots, self._tokens = [1], [2]

    def _best(self, chunks: list[Any]) -> list[int]:
        self._tokens = [_best_id(row) for row in self._executor.run(chunks, self._state).rows]
        return self._tokens

    def _next_of(self, slot: int, ids: list[int]) -> Any:
        return self._chunk(slot, ids, filter=self._filter)


def _best_id(row: Any) -> int:
    """The id of the largest logit of a row of outputs, sparse or in full."""
    return int(row.ids[row.values.argmax()] if hasattr(row, "ids") else row.argmax())


def fill(executor: Any, state: Any, tokens: int) -> None:
    """Make slot 0 remember so many tokens.

    What it remembers is made up: written down at random, through the calls that the torch executor's layers make, or by
    the native library.
    """
    if executor.name == "native":
        from gemkit.executors.native.library import library

        native = ctypes.CDLL(library(free=True)._name)
        native.gk_test_fill.argtypes = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int32
        assert native.gk_test_fill(state.handle, 0, tokens, len(executor.decoder.layers)), "memory ran out"
        state.lengths[0] = tokens
        return
    import torch

    config, generator = executor.decoder, torch.Generator().manual_seed(0)
    dtype = executor.module.decoder.embed_tokens.run_dtype

    def small(*shape: int) -> torch.Tensor:
        return torch.empty(shape).normal_(0, 0.1, generator=generator)

    with torch.inference_mode():
        for layer, memory in zip(config.layers, state.layers, strict=True):
            if hasattr(memory, "keep_hidden"):
                memory.keep_tail(0, small(layer.mixer.conv_width - 1, layer.mixer.width).to(dtype))
                memory.keep_hidden(0, small(layer.mixer.width))
                continue
            shape = (tokens, layer.mixer.kv_heads, layer.mixer.head_dim)  # the next token drops what a window hides
            memory.append(0, 0, small(*shape).to(dtype), small(*shape).to(dtype))
        state.advance([(0, tokens, 0, 0)])


def random_ids(count: int, vocab: int) -> list[int]:
    """<bos>, and ids from a seed."""
    return [2, *np.random.default_rng(0).integers(3, vocab, count - 1).tolist()]


class LlamaCpp(Engine):
    """llama.cpp through its C API: no sampler, no text, and the settings that its own command line ships with.

    Settings: `flash` attention (None: as the library decides), `ubatch` tokens computed at a time, and whether several
    sequences share one `unified` memory.
    """

    def __init__(self, threads: int):
        import llama_cpp

        self._api, self._threads = llama_cpp, threads
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)  # held here, for the library keeps only a pointer
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        build = llama_cpp.llama_print_system_info().decode().strip(" |")
        self.about = f"llama.cpp of llama-cpp-python {llama_cpp.__version__}; {build}"

    def load(self, path: str, context: int, sequences: int = 1, **settings: Any) -> None:
        api = self._api
        model_params = api.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = api.llama_model_load_from_file(os.fsencode(path), model_params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        params = api.llama_context_default_params()
        params.n_ctx = context * sequences
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = self._threads
        params.swa_full = False  # as its command line sets it: a sliding layer remembers its window alone
        if settings.get("flash") is not None:
            params.flash_attn_type = int(settings["flash"])
        if "ubatch" in settings:
            params.n_ubatch = settings["ubatch"]
        if "unified" in settings:
            params.kv_unified = settings["unified"]
        self._context = api.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {context} tokens")
        self._memory = api.llama_get_memory(self._context)
        self._most = params.n_batch
        self._vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._batch = api.llama_batch_init(self._most, 0, 1)
        self.weight_bytes = api.llama_model_size(self._model)
        chosen = ", ".join(f"{key}={value}" for key, value in settings.items()) or "default settings"
        self.about += f"; {chosen}"
        self._states = CACHE / f"{Path(path).name}.{chosen.replace(', ', '.')}.states"

    def start(self, prompts: Prompts) -> list[int]:
        self._forget(len(prompts))
        for first in range(0, max(map(len, prompts)), self._most // len(prompts)):
            self._decode([ids[first : first + self._most // len(prompts)] for ids in prompts])
        return self._best()

    def next(self) -> list[int]:
        self._decode([[token] for token in self._tokens])
        return self._best()

    def fill(self, depth: int) -> None:
        """The prompt takes minutes in a 2B, so the memory is kept in a file, by settings and depth."""
        api, file = self._api, self._states.with_name(f"{self._states.name}.{depth}")
        self._forget(1)
        count = ctypes.c_size_t(0)
        room = (ctypes.c_int32 * 1)()
        if not (file.exists() and api.llama_state_seq_load_file(self._context, os.fsencode(file), 0, room, 1, count)):
            self.start([random_ids(depth, self._vocab)])
            api.llama_state_seq_save_file(self._context, os.fsencode(file), 0, room, 0)
        self._depth = depth

    def resume(self) -> None:
        if not self._api.llama_memory_seq_rm(self._memory, 0, self._depth, -1):
            raise RuntimeError(f"llama.cpp cannot go back to {self._depth} tokens")
        self._lengths, self._tokens = [self._depth], [2]

    def own_bench(self, prompt: int, tokens: int) -> dict[str, Any]:
        """The protocol of llama-bench on an engine that is warm: random tokens, nothing read of the logits.

        Source: test_prompt and test_gen in tools/llama-bench/llama-bench.cpp.
        """
        drawn = np.random.default_rng(1).integers(0, self._vocab, max(prompt, tokens)).tolist()
        self._forget(1)
        start = time.perf_counter()
        if prompt:
            self._decode([drawn])
        for token in drawn[:tokens]:
            self._decode([[token]])
            self._api.llama_synchronize(self._context)
        self._api.llama_synchronize(self._context)
        return {"seconds": time.perf_counter() - start}

    def _forget(self, sequences: int) -> None:
        self._api.llama_memory_clear(self._memory, False)  # forget, do not erase
        self._lengths = [0] * sequences

    def _decode(self, parts: Prompts) -> None:
        """The next tokens of each sequence, in one call; logits are wanted for the last of each."""
        batch, row = self._batch, 0
        self._rows: list[int] = []
        for sequence, ids in enumerate(parts):
            for position, token in enumerate(ids, self._lengths[sequence]):
                batch.token[row], batch.pos[row], batch.logits[row] = token, position, False
                batch.seq_id[row][0], batch.n_seq_id[row] = sequence, 1
                row += 1
            self._lengths[sequence] += len(ids)
            batch.logits[row - 1] = True
            self._rows.append(row - 1)
        batch.n_tokens = row
        if code := self._api.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {code}")

    def _best(self) -> list[int]:
        rows = (self._api.llama_get_logits_ith(self._context, row) for row in self._rows)
        self._tokens = [int(np.ctypeslib.as_array(row, (self._vocab,)).argmax()) for row in rows]
        return self._tokens


class CTranslate2(Engine):
    """CTranslate2, for prompts alone: its decoder works on int8 weights and int8 activations.

    Setting `way`: "generate" answers with one token, and so computes the prompt but its last token, then that one;
    "forward" computes all at once, with the logits of every position.
    """

    def __init__(self, threads: int):
        import ctranslate2

        self._api, self._threads = ctranslate2, threads
        self.about = f"CTranslate2 {ctranslate2.__version__}"

    def load(self, path: str, context: int, sequences: int = 1, **settings: Any) -> None:
        self._way = settings["way"]
        self._model = self._api.Generator(
            path, device="cpu", compute_type="int8", inter_threads=1, intra_threads=self._threads
        )
        with open(f"{path}/vocabulary.json", encoding="utf-8") as file:
            self._pieces = json.load(file)
        self.weight_bytes = os.path.getsize(f"{path}/model.bin")
        self.about += f", {self._model.compute_type}; {self._way}"

    def start(self, prompts: Prompts) -> list[int]:
        pieces = [[self._pieces[i] for i in ids] for ids in prompts]
        if self._way == "generate":
            answers = self._model.generate_batch(
                pieces, max_length=1, min_length=1, sampling_topk=1, include_prompt_in_result=False
            )
            return [answer.sequences_ids[0][0] for answer in answers]
        logits = np.asarray(
            self._model.forward_batch(pieces).to_device(self._api.Device.cpu).to(self._api.DataType.float32)
        )
        return logits[:, -1].argmax(-1).tolist()

    def next(self) -> list[int]:
        raise NotImplementedError("CTranslate2 keeps no memory between calls: it is measured on prompts")


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

    def load(self, path: str, context: int, sequences: int = 1, **settings: Any) -> None:
        dtype = getattr(self._torch, self._dtype)
        load = self._transformers.AutoModelForCausalLM.from_pretrained
        if os.path.isdir(path):
            self._model = load(path, dtype=dtype).eval()
        else:
            folder, name = os.path.split(path)
            self._model = load(folder, gguf_file=name, dtype=dtype).eval()
        self.weight_bytes = sum(weight.nbytes for weight in self._model.parameters())  # a tied head is listed once
        self.about += f"; attention {self._model.config._attn_implementation}"

    def start(self, prompts: Prompts) -> list[int]:
        self._cache = None
        return self._forward(prompts)

    def next(self) -> list[int]:
        return self._forward([[token] for token in self._tokens])

    def _forward(self, rows: Prompts) -> list[int]:
        """The tokens after rows of one length."""
        with self._torch.inference_mode():
            answer = self._model(
                self._torch.tensor(rows), past_key_values=self._cache, use_cache=True, logits_to_keep=1
            )
        self._cache = answer.past_key_values
        self._tokens = answer.logits[:, -1].argmax(-1).tolist()
        return self._tokens


ENGINES: dict[str, Callable[[int], Engine]] = {
    "gemkit": lambda threads: Ours(threads),
    "gemkit-dense": lambda threads: Ours(threads, quantized=False),
    "gemkit-executor": lambda threads: Bare(threads),
    "llama.cpp": lambda threads: LlamaCpp(threads),
    "ctranslate2": lambda threads: CTranslate2(threads),
    "transformers-float32": lambda threads: Transformers(threads, "float32"),
    "transformers-bfloat16": lambda threads: Transformers(threads, "bfloat16"),
}


class Measured:
    """An engine, and the clock around it. A public method is a request; what it returns is the answer."""

    def __init__(self, engine: Engine):
        self._engine: Any = engine
        self._filled: int | None = None

    def load(self, path: str, context: int, **options: Any) -> dict[str, Any]:
        """From opening the file to the first token of a prompt of one, for some engines read as late as that."""
        start = time.perf_counter()
        self._engine.load(path, context, **options)
        self._engine.start([[2]])  # <bos>
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "about": self._engine.about, "weight_bytes": self._engine.weight_bytes}

    def prompt(self, prompts: list[list[int]]) -> dict[str, Any]:
        """From nothing to the token after each prompt."""
        start = time.perf_counter()
        drawn = self._engine.start(prompts)
        return {"seconds": time.perf_counter() - start, "drawn": [drawn]}

    def decode(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """`tokens` more of each sequence after the prompt's first; the prompts are not timed."""
        drawn = [self._engine.start(prompts)]
        start = time.perf_counter()
        drawn += [self._engine.next() for _ in range(tokens)]
        return {"seconds": time.perf_counter() - start, "drawn": drawn}

    def decode_at(self, depth: int, tokens: int) -> dict[str, Any]:
        """`tokens` of one sequence that has `depth` already, of a state made up once."""
        if self._filled != depth:
            self._engine.fill(depth)
            self._filled = depth
        self._engine.resume()
        start = time.perf_counter()
        for _ in range(tokens):
            self._engine.next()
        return {"seconds": time.perf_counter() - start}

    def own_bench(self, **options: Any) -> dict[str, Any]:
        """By the protocol of the engine's own benchmark."""
        return self._engine.own_bench(**options)

    def vocabulary(self, path: str) -> dict[str, Any]:
        self._engine.vocabulary(path)
        return resident()

    def resident(self) -> dict[str, Any]:
        return resident()

    def peak(self) -> dict[str, Any]:
        """The most memory that the process ever held, pages of mapped files among it."""
        return {"bytes": peak_memory()}


class Limits:
    """What this machine gives at most: bytes read from memory, and operations on registers, a second."""

    def __init__(self, threads: int):
        # float32 products by OpenBLAS, whose threads are those of the environment that the runner has set
        self._threads = threads
        self._matrix = np.full((32_768, 4_096), 0.5, np.float32)  # 512 MiB
        self._vector = np.ones(4_096, np.float32)
        self._out = np.empty(32_768, np.float32)

    def read(self, passes: int) -> dict[str, Any]:
        """A matrix far larger than any cache, times a vector, which reads it once from end to end.

        The seconds of the best pass: a limit is what can be reached.
        """
        best = float("inf")
        for _ in range(passes):
            start = time.perf_counter()
            np.dot(self._matrix, self._vector, out=self._out)
            best = min(best, time.perf_counter() - start)
        return {"seconds": best, "bytes": self._matrix.nbytes}

    def compute(self, library: str, passes: int, rounds: int = 2_000_000) -> dict[str, Any]:
        """Operations a second by limits.c, on as many threads: the best of the passes. None: not known here."""
        loaded = ctypes.CDLL(library)
        found: dict[str, Any] = {}
        with ThreadPoolExecutor(self._threads) as pool:  # ctypes lets go of the interpreter's lock
            for kind in ("float32", "int8"):
                function = getattr(loaded, f"limit_{kind}")
                function.restype, function.argtypes = ctypes.c_double, [ctypes.c_int64]
                best = 0.0
                for _ in range(passes):
                    start = time.perf_counter()
                    done = sum(pool.map(function, [rounds] * self._threads))
                    best = max(best, done / (time.perf_counter() - start))
                found[kind] = best or None
        return found


def peak_memory() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


def resident() -> dict[str, Any]:
    """Bytes of this process in memory now, pages of mapped files among them, and its share where pages are shared."""
    found = {}
    for line in Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]:
        name, kilobytes, *_ = line.split()
        found[name.rstrip(":")] = 1024 * int(kilobytes)
    return {"resident": found["Rss"], "proportional": found["Pss"]}


def serve(make: Callable[[str, int], Any]) -> None:
    """Answer requests by the methods of what `make` gives of a name and a number of threads."""
    # What libraries print must not get between the answers: stdout becomes stderr, the answers keep the real one.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    name, threads = sys.argv[1], int(sys.argv[2])
    try:
        worker = make(name, threads)
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
    serve(lambda name, threads: Limits(threads) if name == "limits" else Measured(ENGINES[name](threads)))
