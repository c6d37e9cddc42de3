"""Estimate of a run before its model is loaded: parameters, peak memory, time of a step.

Nothing is estimated by formula that can be computed: the model is built of tensors that have a shape and no content
(torch's `FakeTensorMode`), one part of a step goes forward and back through the real modules, and what would be in
memory at each moment is counted. So an adapter, a soft cap, a window, a recurrence, blocks that are computed again all
cost what the code makes them cost. Added by rule: the loss (`linear_cross_entropy.extra_bytes`), the weights, their
gradients and the optimizer, the process itself.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from gemkit import family
from gemkit.errors import ConfigError
from gemkit.inspect.units import exact, memory
from gemkit.memory import resident_memory
from gemkit.nn import Batch, LanguageModel, build
from gemkit.ops.linear_cross_entropy import CHUNK, extra_bytes
from gemkit.train.experiment import Experiment
from gemkit.train.step import activation_checkpointing

# Memory that is taken over what is in use at the highest moment: malloc keeps freed pieces for later ones of their
# size. Measured with the starter model, see docs/training.md.
_SLACK = 1.08
# Beside it what a run loads after its plan: a vocabulary of 262,144 pieces, libraries, what malloc keeps of loading.
_LATER = 350_000_000
_LIBRARIES = 400_000_000  # of the process without a model, where the system does not say
# Time of a whole step over that of its products alone, at the rate that a product of its size is measured with.
_OVERHEAD = 1.4

# torch's formulas, and those of its CPU attention, which has none. Not by `FlopCounterMode`: its hooks on modules keep
# activations that blocks which are computed again do not (measured: 6.3 MB for 4.0).
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
        sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)
    ),
}

Prepare = Callable[[LanguageModel], Any]  # freezes, puts adapters in: what `run` does to the real module


@dataclass(frozen=True)
class Plan:
    """Bytes and operations of a run."""

    parameters: int  # of the model, the tied head counted once, without adapters
    trainable: int
    weights: int  # bytes: of the model, with adapters
    gradients: int
    optimizer: int  # moments, and float32 masters
    activations: int  # that one part of a step keeps and makes, at its highest
    loss: int  # beside them, where the head is
    process: int  # libraries
    tokens: int  # of a part
    tokens_per_step: int
    flops: float  # of a step
    checkpointing: bool

    @property
    def peak(self) -> int:
        """Bytes at the highest moment: at the head, or on the way back, when the gradients come to be. A step in parts
        has them from the second part on."""
        held = self.weights + self.optimizer
        if self.tokens_per_step > self.tokens:
            working = self.gradients + max(self.activations, self.loss)
        else:
            working = max(self.loss, self.activations + self.gradients)
        return int((held + working) * _SLACK) + self.process

    def seconds(self, rate: float) -> float:
        """Of a step, on a machine of this many operations a second."""
        return self.flops / rate * _OVERHEAD

    def lines(self, rate: float, available: int | None) -> list[str]:
        """For people."""
        share = f" ({self.trainable / self.parameters:.2%})" if self.trainable <= self.parameters else ""
        again = ", blocks computed again" if self.checkpointing else ""
        seconds = self.seconds(rate)
        free = "" if available is None else f", {memory(available)} free"
        return [
            f"trained      {exact(self.trainable)} of {exact(self.parameters)} parameters{share}",
            f"weights      {memory(self.weights)}",
            f"gradients    {memory(self.gradients)}",
            f"optimizer    {memory(self.optimizer)}",
            f"activations  {memory(max(self.activations, self.loss))} for {exact(self.tokens)} tokens at once{again}",
            f"peak memory  {memory(self.peak)}, {memory(self.process)} of it the process{free}",
            f"step         {exact(self.tokens_per_step)} tokens at most, {seconds:.3g} s: "
            f"{self.tokens_per_step / seconds:,.0f} tok/s at {rate / 1e9:,.0f} GFLOP/s",
        ]


def predict(
    experiment: Experiment,
    decoder: family.DecoderConfig,
    vision: family.Modality | None,
    prepare: Prepare,
    *,
    dtype: torch.dtype,
    stored: int | None = None,
    checkpointing: bool = False,
    models: int = 1,
) -> Plan:
    """Upper bound of a run's needs: parts of sequences of `data.max_length`, with every token in the loss.

    Args:
        prepare: what is done to the module before it is trained.
        stored: bytes of the weights, if they are quantized. None: all are dense.
        checkpointing: whether blocks are computed again.
        models: how many of that size are in memory: a teacher, a reference.
    """
    longest = min(experiment.data.max_length, decoder.max_context)
    sequences = max(1, experiment.step.microbatch_tokens // longest)
    per_step = experiment.data.batch_tokens or experiment.data.batch_size * longest
    sequences = min(sequences, math.ceil(per_step / longest))
    fake, seen = _fake(decoder, vision, prepare, dtype)
    tokens = longest * sequences
    with fake:
        module, (trained, bytes_trained, bytes_masters, bytes_all) = seen
        with activation_checkpointing(module, checkpointing):
            peak, kept, flops = _computed(module, sequences, longest, dtype)
    counts = sum(math.prod(shape) for _, shape in family.parameters(decoder, vision))
    table_trained = any(name.endswith("embed_tokens.weight") for name in trained)
    head = extra_bytes(tokens, decoder.vocab_size, decoder.width, itemsize=dtype.itemsize, table=table_trained)
    if stored is not None and dtype != torch.float32:  # logits and gradients of a chunk are not made in place then
        head += 3 * min(tokens * decoder.vocab_size, CHUNK) * 4
    own = bytes_all if stored is None else stored + bytes_trained
    head_flops = (6 if table_trained else 4) * tokens * decoder.width * decoder.vocab_size
    return Plan(
        parameters=counts,
        trainable=sum(trained.values()),
        weights=own + (models - 1) * (bytes_all if stored is None else stored),
        gradients=4 * sum(trained.values()),
        optimizer=8 * sum(trained.values()) + bytes_masters,
        activations=int(peak),
        loss=int(kept) + head,
        process=(resident_memory() or _LIBRARIES) + _LATER,
        tokens=tokens,
        tokens_per_step=per_step,
        flops=(flops + head_flops) * per_step / tokens * (1 + (models - 1) / 3),
        checkpointing=checkpointing,
    )


def choose(
    experiment: Experiment, of: Callable[[Experiment, bool], Plan], available: int | None, *, quantizes: bool
) -> Plan:
    """The plan of an experiment, with blocks computed again if it does not fit otherwise and the choice is left to us.

    Args:
        of: the plan of an experiment, and whether blocks are computed again.
        available: bytes; None: unknown, and everything fits.
        quantizes: whether weights=int4 is another way out.

    Raises:
        ConfigError: if it does not fit; with the setting that would, if there is one.
    """
    setting = experiment.step.activation_checkpointing
    plan = of(experiment, setting == "on")
    if available is None or plan.peak <= available:
        return plan
    if setting == "auto" and (again := of(experiment, True)).peak <= available:
        return again
    tried = experiment
    said = []
    for name, change in _ways_out(experiment, quantizes):
        tried = change(tried)
        said.append(name)
        if (other := of(tried, True)).peak <= available:
            way = f"{' and '.join(said)} would fit, in {memory(other.peak)}"
            break
    else:
        way = f"not even {' and '.join(said)} would fit: take a smaller member"
    raise ConfigError(f"this run needs {memory(plan.peak)} at its highest and {memory(available)} are free; {way}")


def _ways_out(experiment: Experiment, quantizes: bool) -> Iterator[tuple[str, Callable[[Experiment], Experiment]]]:
    """Settings that need less, the mildest first."""
    longest, most = experiment.data.max_length, experiment.step.microbatch_tokens
    if experiment.step.activation_checkpointing == "off":
        yield (
            "step.activation_checkpointing=on",
            lambda e: replace(e, step=replace(e.step, activation_checkpointing="on")),
        )
    if most > longest:
        yield f"step.microbatch_tokens={longest}", lambda e: replace(e, step=replace(e.step, microbatch_tokens=longest))
    if not experiment.lora.rank and not experiment.model.new:
        yield "lora.rank=8", lambda e: replace(e, lora=replace(e.lora, rank=8))
    if quantizes and not experiment.model.new and not experiment.model.weights:
        yield "model.weights=int4", lambda e: replace(e, model=replace(e.model, weights="int4"))
    if longest > 256:
        yield (
            "data.max_length=256",
            lambda e: replace(e, data=replace(e.data, max_length=256), step=replace(e.step, microbatch_tokens=256)),
        )


def flops_per_second(decoder: family.DecoderConfig, tokens: int, dtype: torch.dtype, device: str = "cpu") -> float:
    """Operations a second of this machine, measured on a product of the shape that most of the model's have."""
    widest = max(layer.ffw.width for layer in decoder.layers)
    rows, depth, columns = min(tokens, 512), min(decoder.width, 2048), min(widest, 4096)
    a, b = (torch.ones(shape, dtype=dtype, device=device) for shape in ((rows, depth), (depth, columns)))
    best = math.inf
    end = time.perf_counter() + 0.2
    while time.perf_counter() < end or best == math.inf:
        start = time.perf_counter()
        float((a @ b)[0, 0])  # waits for a device
        best = min(best, time.perf_counter() - start)
    return 2 * rows * depth * columns / best


# ── a model without content ─────────────────────────────────────────────────────────────────────────────────────────


def _fake(decoder: family.DecoderConfig, vision: family.Modality | None, prepare: Prepare, dtype: torch.dtype) -> Any:
    """The mode in which tensors have no content; the module in it; and of its parameters: what is trained, by name,
    bytes of it, of masters, and of all."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    with mode:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            module = build(decoder, vision)
        finally:
            torch.set_default_dtype(before)
        prepare(module)
        trained: dict[str, int] = {}
        bytes_trained = bytes_masters = bytes_all = 0
        for name, parameter in module.named_parameters():
            bytes_all += parameter.nbytes
            if parameter.requires_grad:
                trained[name] = parameter.numel()
                bytes_trained += parameter.nbytes
                bytes_masters += 4 * parameter.numel() if parameter.dtype == torch.bfloat16 else 0
                # its gradient is counted as one that is there all the time, as it is from the second part on
                parameter.register_post_accumulate_grad_hook(_forget)
    return mode, (module, (trained, bytes_trained, bytes_masters, bytes_all))


def _computed(module: LanguageModel, sequences: int, length: int, dtype: torch.dtype) -> tuple[float, float, float]:
    """Bytes at the highest moment, bytes kept for the gradient, and operations, of sequences forward and back.

    More than two are not computed: each takes what the second takes besides the first.
    """
    if sequences > 2:
        one, two = (_computed(module, count, length, dtype) for count in (1, 2))
        first, *others = (a + (sequences - 1) * (b - a) for a, b in zip(one, two, strict=True))
        return first, others[0], others[1]
    batch, pixels = _batch(sequences, length, module.vision, dtype)
    with _Meter() as meter:
        x_TD = module(batch, None, torch.arange(sequences * length), pixels, output="hidden")
        kept = meter.now
        if x_TD.requires_grad:
            x_TD.backward(torch.zeros_like(x_TD))
    return meter.peak, kept, float(meter.flops)


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


class _KnownBatch(Batch):
    """A batch whose boundaries are numbers: those of tensors without content cannot be read."""

    lengths: tuple[int, ...]
    seen_whole: int

    def __post_init__(self) -> None:
        pass

    def sequences(self) -> Iterator[tuple[int, int, int, int]]:
        first = 0
        for slot, length in enumerate(self.lengths):
            yield first, first + length, slot, 0
            first += length

    def span_rows(self) -> list[tuple[int, int]]:
        return [(first, first + self.seen_whole) for first, *_ in self.sequences() if self.seen_whole]

    def expect_features(self, features_ED: Tensor | None) -> None:
        pass

    def expect_causal(self) -> None:
        pass


def _batch(
    sequences: int, length: int, vision: family.Modality | None, dtype: torch.dtype
) -> tuple[Batch, Tensor | None]:
    """Sequences of one length, each with an image if the model sees them."""
    total = sequences * length
    patches = 0 if vision is None else min(vision.tokens, length)
    none = torch.zeros(sequences, dtype=torch.int64)
    batch = _KnownBatch(
        torch.zeros(total, dtype=torch.int64),
        torch.arange(total),
        none,
        none,
        none,
        none,
        torch.arange(patches * sequences),
    )
    object.__setattr__(batch, "lengths", (length,) * sequences)
    object.__setattr__(batch, "seen_whole", patches)
    if vision is None:
        return batch, None
    size = vision.tower.image_size
    return batch, torch.zeros(sequences, 3, size, size, dtype=dtype)


class _Meter(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and the operations of all products."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for value in tree_leaves((args, kwargs)):
            self._count(value, new=False)  # a weight that was there before: a view of it, such as its transpose, is too
        out = func(*args, **(kwargs or {}))
        if (formula := _FLOPS.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        for value in tree_leaves(out):
            self._count(value, new=True)
        return out

    def _count(self, value: Any, *, new: bool) -> None:
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = storage.nbytes() if new else 0
            self.now += self._alive[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)
