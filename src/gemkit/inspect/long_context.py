"""Decode rate and memory against depth, measured: what long sequences cost a recurrent and an attentive model.

Each model runs in a process of its own, so that its resident memory is its own, and two of them take turns, so that a
busy minute of the machine falls on both. Weights are random: neither rate nor memory depends on their values.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from gemkit import family
from gemkit.errors import ConfigError
from gemkit.inspect import Subject, compare, cost, units
from gemkit.memory import resident_memory

ROUNDS = 5
NOISE = 0.2  # a spread of rounds from which a figure is doubtful
SMALL = 4  # `small` divides every width by this
DTYPE = "bfloat16"  # what all of the family is published in


@dataclass(frozen=True)
class Plan:
    """Two models and the depths to measure them at.

    Args:
        depths: tokens remembered, ascending.
        scale: "small" measures both together, "full" one after the other, so that one is in memory at a time.
        tokens: decoded in each of `ROUNDS` rounds.
        threads: of torch; None: as torch chooses.
        decode_all: reach each depth by generating, not by filling.
    """

    subjects: tuple[Subject, Subject]
    depths: list[int]
    scale: str
    tokens: int
    threads: int | None
    decode_all: bool


def same_size(decoder: family.DecoderConfig) -> str:
    """The Gemma 1 with the nearest number of parameters."""
    size = cost.count(decoder).total
    plain = [member for member in family.members() if member.family == "Gemma 1" and member.tuning == "pretrained"]
    return min(plain, key=lambda member: abs(cost.count(member.decoder).total - size)).name


def small(decoder: family.DecoderConfig) -> family.DecoderConfig:
    """The decoder with every width divided by `SMALL`, so with about 1/16 of the parameters. The layers and their
    windows, the numbers of heads and the context stay.

    Raises:
        ConfigError: if the widths cannot be divided.
    """

    def narrow(layer: family.Layer) -> family.Layer:
        mixer, divided = layer.mixer, "width" if isinstance(layer.mixer, family.Recurrent) else "head_dim"
        mixer = replace(mixer, **{divided: getattr(mixer, divided) // SMALL})
        return family.Layer(mixer, family.Mlp(layer.ffw.width // SMALL))

    try:
        return replace(
            decoder,
            vocab_size=decoder.vocab_size // SMALL,
            width=decoder.width // SMALL,
            layers=tuple(map(narrow, decoder.layers)),
        )
    except ConfigError as error:
        raise ConfigError(f"this shape cannot be divided by {SMALL} ({error}): use --scale full") from None


class Depths:
    """One model with random weights, whose one sequence grows from depth to depth."""

    def __init__(self, decoder: family.DecoderConfig, tokens: int, threads: int | None = None):
        import torch

        from gemkit.executors.torch import TorchExecutor
        from gemkit.nn import Decoder

        if threads is not None:
            torch.set_num_threads(threads)
        torch.manual_seed(0)
        with torch.device("meta"):
            module = Decoder(decoder)
        for name, shape in family.parameters(decoder):
            weight = torch.empty(shape, dtype=torch.bfloat16).normal_(0, shape[-1] ** -0.5)
            module.set_param(name, torch.nn.Parameter(weight, requires_grad=False))
        self.threads = torch.get_num_threads()
        self.executor = TorchExecutor(module)
        self.state = self.executor.new_state(1)
        self._tokens = tokens
        self._next = 0

    def machine(self) -> tuple[int, float]:
        """Threads, and bytes a second at which they read memory, which a decode step cannot exceed."""
        import torch

        numbers = torch.ones(2**26)  # 268 MB: more than any cache
        seconds = min(_seconds(numbers.sum) for _ in range(4))
        return self.threads, numbers.nbytes / seconds

    def fill(self, depth: int) -> None:
        """Remember random numbers up to `depth` tokens, row by row as decoding would, so that buffers grow alike."""
        import torch

        config, start = self.state.decoder, self.state.lengths[0]
        with torch.inference_mode():
            # a few hundred rows again and again: random numbers for all would take longer than everything else
            numbers: dict[tuple[int, int], list[Any]] = {}
            for layer, entry in zip(config.layers, self.state.layers, strict=True):
                mixer = layer.mixer
                if isinstance(mixer, family.Recurrent):
                    entry.keep_tail(0, torch.randn(mixer.conv_width - 1, mixer.width, dtype=torch.bfloat16))
                    entry.keep_hidden(0, torch.randn(mixer.width))
                    continue
                heads = (mixer.kv_heads, mixer.head_dim)
                if heads not in numbers:
                    rows = torch.randn(256, 2, 1, *heads, dtype=torch.bfloat16)
                    numbers[heads] = [tuple(row) for row in rows]
                pairs = numbers[heads]
                for position in range(start, depth):
                    entry.append(0, position, *pairs[position % len(pairs)])
        self.state.advance([(0, depth - start, 0, start)])

    def decode(self, count: int) -> None:
        """Generate `count` tokens, each the likeliest."""
        import numpy as np

        from gemkit.executors.interface import Chunk

        for _ in range(count):
            (logits_V,) = self.executor.run([Chunk(0, [self._next])], self.state).rows
            self._next = int(np.argmax(logits_V))

    def deepen(self, depth: int, decode_all: bool) -> int:
        """Bring the sequence to `depth` tokens and warm up there; bytes that the state then holds."""
        if decode_all:
            self.decode(depth - self.state.lengths[0])
        elif depth > self.state.lengths[0]:
            self.fill(depth)
        held = self.state.nbytes
        self.round()  # the first after a filling is slow: buffers grow, pages come in
        return held

    def round(self) -> tuple[float, int | None]:
        """Seconds of decoding some tokens from here, which are then forgotten; resident bytes meanwhile."""
        snapshot = self.state.snapshot(0)
        seconds = _seconds(lambda: self.decode(self._tokens))
        memory = resident_memory()
        self.state.restore(snapshot, 0)
        return seconds, memory


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Worker:
    """A `Depths` in a process of its own."""

    def __init__(self, label: str, pipe: Any, process: Any):
        self._label, self._pipe, self.process = label, pipe, process

    def ask(self, method: str, *args: Any) -> Any:
        """Result of `Depths.method(*args)` there.

        Raises:
            ConfigError: if the process has died.
        """
        try:
            self._pipe.send((method, args))
            return self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise ConfigError(
                f"the process that ran {self._label} has died, perhaps for want of memory: "
                "fewer --layers, smaller --depths or --scale small need less"
            ) from None


@contextmanager
def worker(label: str, *args: Any) -> Iterator[Worker]:
    """A worker whose process ends with the block; `args` are those of `Depths`."""
    from multiprocessing import get_context

    context = get_context("spawn")  # forking a process that runs torch's threads can hang
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, *args), daemon=True)
    process.start()
    theirs.close()  # so that its end is noticed
    try:
        yield Worker(label, ours, process)
    finally:
        process.terminate()
        process.join()


def _serve(pipe: Any, *args: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who ends this process
    depths = Depths(*args)
    while True:
        method, given = pipe.recv()
        pipe.send(getattr(depths, method)(*given))


def measure(
    plan: Plan,
    *,
    progress: Callable[[str], Any] | None = None,
    ceiling: Callable[[dict[str, Any]], Any] | None = None,
) -> dict[str, Any]:
    """The figures of both models at each depth, as plain data for JSON.

    Args:
        progress: is called with a line on each step that takes a while.
        ceiling: is called with the report once it holds the shapes and the memory bandwidth, before anything decodes.

    Raises:
        ConfigError: if the models do not fit into memory, or a process of theirs dies.
    """
    say = progress or (lambda line: None)
    check_memory(plan)
    report: dict[str, Any] = {
        "scale": plan.scale,
        "weights": "random",
        "dtype": DTYPE,
        "depths": plan.depths,
        "decode_all": plan.decode_all,
        "rounds": ROUNDS,
        "tokens": plan.tokens,
        "models": [
            {
                "model": subject.label,
                "parameters": cost.count(subject.decoder).total,
                "layers": len(subject.decoder.layers),
                "width": subject.decoder.width,
                "ffw_width": compare.shared(layer.ffw.width for layer in subject.decoder.layers),
                "vocab_size": subject.decoder.vocab_size,
                "max_context": subject.decoder.max_context,
                "weight_bytes": cost.weight_bytes(subject.decoder, dtype=DTYPE),
                "measured": [],
            }
            for subject in plan.subjects
        ],
    }
    pairs = list(zip(plan.subjects, report["models"], strict=True))
    for together in [pairs] if plan.scale == "small" else [[pair] for pair in pairs]:
        with ExitStack() as stack:
            workers = []
            for subject, record in together:
                say(f"{subject.label}: making random weights, {record['weight_bytes'] / 1e6:,.0f} MB")
                entered = stack.enter_context(worker(subject.label, subject.decoder, plan.tokens, plan.threads))
                workers.append(entered)
            if "threads" not in report:
                report["threads"], report["read_bytes_per_second"] = workers[0].ask("machine")
                if ceiling is not None:
                    ceiling(report)
            for depth in plan.depths:
                way = "generating up to" if plan.decode_all else "filling states up to"
                say(f"{way} {depth:,} tokens, then {ROUNDS} rounds of {plan.tokens}")
                held = [one.ask("deepen", depth, plan.decode_all) for one in workers]
                rounds = [[one.ask("round") for one in workers] for _ in range(ROUNDS)]
                for (subject, record), bytes_held, of_one in zip(
                    together, held, zip(*rounds, strict=True), strict=True
                ):
                    record["measured"].append(_figures(subject.decoder, depth, plan.tokens, bytes_held, of_one))
    return report


def _figures(
    decoder: family.DecoderConfig, depth: int, tokens: int, held: int, rounds: Sequence[tuple[float, int | None]]
) -> dict[str, Any]:
    each = [seconds / tokens for seconds, _ in rounds]
    middle = sorted(each)[len(each) // 2]
    read = cost.decode_bytes(decoder, depth, DTYPE)
    return {
        "depth": depth,
        "tokens_per_second": 1 / middle,
        "ms_per_token": middle * 1e3,
        "spread": (max(each) - min(each)) / middle,
        "read_bytes": read,
        "read_bytes_per_second": read / middle,
        "state_bytes": held,
        "state_bytes_needed": cost.state_bytes(decoder, depth).total,
        "resident_bytes": rounds[-1][1],
        "rounds_ms_per_token": [seconds * 1e3 for seconds in each],
    }


def check_memory(plan: Plan) -> None:
    """Refuse what cannot fit before the machine starts to swap."""
    from gemkit.memory import available_memory

    # while a buffer of keys grows, it is there as it was and half as large again
    needs = [
        cost.weight_bytes(s.decoder, dtype=DTYPE) + 5 * cost.state_bytes(s.decoder, plan.depths[-1]).total // 2
        for s in plan.subjects
    ]
    need, free = (sum if plan.scale == "small" else max)(needs), available_memory()
    if free is not None and need > free:
        raise ConfigError(
            f"weights and states take {units.memory(need)} and {units.memory(free)} of memory is free: "
            "fewer --layers, smaller --depths or --scale small need less"
        )
