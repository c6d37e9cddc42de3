"""The one loop that trains, for every objective.

    units of a step ─ prepare ─ size ─ parts of max_tokens ─ (loss / size).backward() each ─ finite? ─ clip ─ AdamW

A step is the same whether it is computed at once or in parts: each part's loss is a sum, and all are divided by the
size of the whole step. Nothing is remembered between steps but weights, optimizer, the position in the data and the
number of the step, from which its random numbers come; so what a checkpoint holds is all there is, and a run that was
killed goes on to the same bits.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils import deterministic as _deterministic

from gemkit.errors import NoSpaceError, TrainingError
from gemkit.inspect import curves
from gemkit.memory import peak_memory
from gemkit.nn import LanguageModel
from gemkit.train import nonfinite
from gemkit.train.batching import Unit
from gemkit.train.checkpoint import Checkpoints, Saved, replace_bytes
from gemkit.train.experiment import Experiment
from gemkit.train.objective import Objective
from gemkit.train.optimizer import KIND, Optimizer

deterministic: Any = _deterministic  # a module whose one setting torch's stubs do not know


class Source(Protocol):
    """Where the units of each step come from (`data.Steps` is one)."""

    def __iter__(self) -> Iterator[Sequence[Unit]]: ...

    def state(self) -> Mapping[str, Any]:
        """The position after the step that was handed out last, for JSON."""
        ...

    def resume(self, state: Mapping[str, Any], *, force: bool = False) -> None:
        """Go on from there; with `force` even if the data is another."""
        ...


@dataclass(frozen=True)
class Progress:
    """How a step went."""

    step: int  # steps taken, this one included
    steps: int
    loss: float
    rate: float
    norm: float  # of all gradients, before clipping
    tokens: int
    seconds: float
    peak_memory: int  # bytes, of the process or the device
    metrics: Mapping[str, float] = field(default_factory=dict)
    left: float = 0.0  # seconds to the end, as the steps so far took

    def __str__(self) -> str:
        from gemkit.inspect.units import memory

        metrics = "".join(f"  {name} {value:.4g}" for name, value in self.metrics.items())
        minutes, seconds = divmod(round(self.left), 60)
        return (
            f"step {self.step:>{len(str(self.steps))}}/{self.steps} ({self.step / self.steps:.0%})  "
            f"loss {self.loss:.4f}{metrics}  lr {self.rate:.1e}  {1000 * self.seconds:,.0f} ms  "
            f"{self.tokens / max(self.seconds, 1e-9):,.0f} tok/s  peak {memory(self.peak_memory)}  "
            f"eta {minutes}m{seconds:02d}s"
        )


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int  # steps taken
    steps: int
    loss: float | None  # of the last step
    held_out: Mapping[str, float]  # the last evaluation; empty: there was none
    stopped: bool  # by a signal, before its end


class Trainer:
    """Trains a module.

    Args:
        model: a `LanguageModel`, its weights loaded.
        objective: what is learned.
        source: the units of each step.
        experiment: its `optimizer` has nothing left out.
        steps: of the whole run.
        parameters: what is trained; None: all that take a gradient.
        folder: where checkpoints, log and curve go; None: nowhere.
        origin: what a checkpoint must agree with to go on from it, by name: the model, the data.
        held_out: units that are never trained on.
        sample: answers to prompts at some step, for people.
        on_step, say: are told how each logged step went, and what else happens.
    """

    def __init__(
        self,
        model: LanguageModel,
        objective: Objective,
        source: Source,
        experiment: Experiment,
        steps: int,
        *,
        parameters: Mapping[str, Parameter] | None = None,
        folder: str | os.PathLike[str] | None = None,
        origin: Mapping[str, Any] | None = None,
        held_out: Sequence[Unit] = (),
        sample: Callable[[], Sequence[tuple[str, str]]] | None = None,
        on_step: Callable[[Progress], Any] = lambda _: None,
        say: Callable[[str], Any] = lambda _: None,
    ):
        if parameters is None:
            parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.model, self.objective, self.source = model, objective, source
        self.experiment, self.steps, self.step = experiment, steps, 0
        self.optimizer = Optimizer(parameters, experiment.optimizer, steps)
        self.origin = dict(origin or {})
        self.held_out, self.sample = list(held_out), sample
        self.on_step, self.say = on_step, say
        # absolute: a run outlives the folder that it was started in
        self.folder = None if folder is None else Path(folder).absolute()
        keep = experiment.save.keep
        self.checkpoints = None if self.folder is None else Checkpoints(self.folder / "checkpoints", keep)
        self.log = Log(None if self.folder is None else self.folder / "log.jsonl")
        self._skipped = 0  # steps in a row that were left out
        self._signals = 0
        self._unsaved = False  # a checkpoint that the disk had no room for

    # ── the run ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> Outcome:
        """Train to the end, or until a signal asks to stop.

        Raises:
            TrainingError: for a loss or a gradient that is not finite, with the name of what made it; the last good
                checkpoint is then the newest.
        """
        watch, save = self.experiment.watch, self.experiment.save
        start, first, loss = time.monotonic(), self.step, None
        with _settings(self.experiment), blocks_again(self.model, self.experiment.step.checkpointing == "on"):
            with self._stoppable():
                if self.step == 0 and self.held_out:
                    self.evaluate()
                batches, saved = iter(self.source), False
                while self.step < self.steps and not self._signals:
                    began = time.monotonic()
                    units = next(batches, None)
                    if units is None:
                        raise TrainingError(f"the data ended after {self.step} of {self.steps} steps")
                    progress = self._step(units, began)
                    if progress is not None:
                        loss = progress.loss
                    passed = self.step - first
                    if progress is not None and (self.step % watch.log_every == 0 or self.step == self.steps):
                        left = (time.monotonic() - start) / passed * (self.steps - self.step)
                        self.on_step(replace(progress, left=left))
                    last = self.step == self.steps or self._signals > 0
                    if self.held_out and (_due(self.step, watch.evaluate_every) or self.step == self.steps):
                        self.evaluate()
                    if self.sample and (_due(self.step, watch.sample_every) or self.step == self.steps):
                        self._show_samples()
                    if saved := last or self._unsaved or _due(self.step, save.every):
                        self.save(final=last)
                if self._signals and (self._unsaved or not saved):  # it came after this step was looked at
                    self.save(final=True)
            self.draw()
        return Outcome(self.step, self.steps, loss, self.log.last_evaluation(), self.step < self.steps)

    def _step(self, units: Sequence[Unit], began: float) -> Progress | None:
        """One step; None if it was left out."""
        seeded(self.experiment.seed, self.step)
        self.model.train()
        units = self.objective.prepare(self.model, units, self._rng())
        self.model.train()  # answering prompts is done in evaluation mode
        size = self.objective.size(units)
        if not size > 0:
            self._leave_out("nothing in it has a weight in the loss")
            return None
        parts = list(cut(units, self.experiment.step.max_tokens))
        total, metrics, why = 0.0, dict[str, float](), ""
        for part in parts:
            loss = self.objective.loss(self.model, part)
            value = float(loss.total.detach()) / size
            total += value
            for name, amount in loss.metrics.items():
                metrics[name] = metrics.get(name, 0.0) + amount / size
            if not math.isfinite(value):
                why = f"the loss is {value}"
                break
            (loss.total / size).backward()
            del loss
        norm = math.nan if why else self.optimizer.norm()
        if not why and not math.isfinite(norm):
            why = f"the loss is {total:.4f}, the norm of its gradient {norm}"
        if why:
            self._refuse(why, parts, size)
            return None
        rate = self.optimizer.step(self.step, norm)
        self._skipped = 0
        self.step += 1
        progress = Progress(
            step=self.step,
            steps=self.steps,
            loss=total,
            rate=rate,
            norm=norm,
            tokens=sum(len(example) for unit in units for example in unit),
            seconds=time.monotonic() - began,
            peak_memory=_peak_memory(self.model),
            metrics=metrics,
        )
        entry = {name: value for name, value in progress.__dict__.items() if name not in ("left", "steps", "metrics")}
        self.log.add({**entry, **metrics})
        return progress

    def _rng(self) -> np.random.Generator:
        return np.random.default_rng([self.experiment.seed, self.step, 1])

    def _refuse(self, why: str, parts: Sequence[Sequence[Unit]], size: float) -> None:
        """Find what made numbers that are not finite; leave the step out, or stop."""
        self.optimizer.forget()
        seeded(self.experiment.seed, self.step)

        def loss(units: Sequence[Unit]) -> Tensor:
            return self.objective.loss(self.model, units).total / size

        found = nonfinite.blame(self.model, parts, loss)
        self.optimizer.forget()
        said = f"step {self.step + 1}: {why}: {found}"
        if self._skipped >= self.experiment.step.skip_nonfinite:
            self.log.add({"step": self.step, "event": "stopped", "why": said})
            kept = self.checkpoints.steps() if self.checkpoints is not None else []
            rest = f"the checkpoint of step {kept[-1]} is kept" if kept else "there is no checkpoint yet"
            raise TrainingError(
                f"{said}. The weights were not changed by it; {rest}. A smaller optimizer.learning_rate or "
                "dtype=float32 may help, and step.skip_nonfinite=N leaves out up to N such steps in a row"
            )
        self._leave_out(f"{why}: {found}")

    def _leave_out(self, why: str) -> None:
        """Count a step that changes nothing."""
        self._skipped += 1
        self.step += 1
        self.log.add({"step": self.step, "event": "skipped", "why": why})
        self.say(f"step {self.step} is left out: {why}")
        if self._skipped > max(self.experiment.step.skip_nonfinite, 100):
            raise TrainingError(f"step {self.step}: {self._skipped} steps in a row were left out; the last: {why}")

    # ── looking at it ───────────────────────────────────────────────────────────────────────────────────────────────

    def evaluate(self) -> dict[str, float]:
        """The loss on what is held out, and the objective's metrics of it."""
        seeded(self.experiment.seed, 0, purpose=2)
        self.model.eval()
        with torch.no_grad():
            rng = np.random.default_rng([self.experiment.seed, 2])
            units = self.objective.prepare(self.model, self.held_out, rng)
            self.model.eval()
            sums = {"loss": 0.0}
            for part in cut(units, self.experiment.step.max_tokens):
                loss = self.objective.loss(self.model, part)
                for name, value in {"loss": float(loss.total), **loss.metrics}.items():
                    sums[name] = sums.get(name, 0.0) + value
        size = self.objective.size(units)
        found = {name: value / size if size else math.nan for name, value in sums.items()}
        self.log.add({"step": self.step, "held_out": found})
        self.say(f"step {self.step}: held out " + "  ".join(f"{name} {value:.4f}" for name, value in found.items()))
        return found

    def _show_samples(self) -> None:
        assert self.sample is not None
        seeded(self.experiment.seed, self.step, purpose=3)
        answers = self.sample()
        self.log.add({"step": self.step, "samples": [{"prompt": p, "text": t} for p, t in answers]})
        for prompt, text in answers:
            self.say(f"step {self.step}: {prompt!r} -> {text!r}")

    def draw(self) -> None:
        """The curve of the log, as SVG."""
        if self.folder is None or (picture := curve(self.log.entries, self.experiment.objective)) is None:
            return
        try:
            replace_bytes(self.folder / "curve.svg", picture.encode())
        except TrainingError as error:  # a full disk must not end a run that is otherwise well
            self.say(f"the curve is not drawn: {error}")

    # ── being killed, and going on ──────────────────────────────────────────────────────────────────────────────────

    def save(self, *, final: bool = False) -> None:
        """Write a checkpoint. If the disk has no room it is tried again at the next step, unless this is the last."""
        if self.checkpoints is None:
            return
        self.log.sync()
        state = {
            "optimizer": KIND,
            "objective": self.objective.name,
            "origin": self.origin,
            "threads": torch.get_num_threads(),
            "data": self.source.state(),
            "skipped": self._skipped,
        }
        weights = {name: value.detach() for name, value in self.optimizer.parameters.items()}
        try:
            self.checkpoints.save(Saved(self.step, weights, self.optimizer.state(), state))
            self._unsaved = False
        except NoSpaceError as error:
            if final:
                raise
            if not self._unsaved:
                self.log.add({"step": self.step, "event": "not saved", "why": str(error)})
                self.say(f"step {self.step}: {error}; training goes on, and the next step tries again")
            self._unsaved = True
        self.draw()

    @torch.no_grad()
    def resume(self, saved: Saved, *, force: bool = False) -> None:
        """Go on from a checkpoint.

        Args:
            force: even if the model or the data are not those that it came from.

        Raises:
            TrainingError: if it is that of another run, by the name of what differs.
        """
        state = saved.state
        if state.get("optimizer") != KIND:
            raise TrainingError(f"the checkpoint's optimizer is {state.get('optimizer')!r}, and this is {KIND!r}")
        if state.get("objective") != self.objective.name:
            raise TrainingError(
                f"the checkpoint learns {state.get('objective')!r}, and this run {self.objective.name!r}"
            )
        origin = state.get("origin", {})
        for name in sorted({*origin, *self.origin}):
            if origin.get(name) != self.origin.get(name) and not force:
                raise TrainingError(
                    f"{name} is not what the checkpoint of step {saved.step} was made with: "
                    f"{_shown(origin.get(name))} then, {_shown(self.origin.get(name))} now; --force goes on anyway"
                )
        mine = self.optimizer.parameters
        if strange := sorted(set(mine) ^ set(saved.weights)):
            where = "is not trained here" if strange[0] in saved.weights else "is not in it"
            raise TrainingError(f"the checkpoint is that of another model: {strange[0]} {where}")
        for name, value in saved.weights.items():
            if mine[name].shape != value.shape or mine[name].dtype != value.dtype:
                raise TrainingError(
                    f"the checkpoint is that of another model: {name} is {tuple(value.shape)} {value.dtype} in it, "
                    f"{tuple(mine[name].shape)} {mine[name].dtype} here"
                )
        if (threads := state.get("threads")) != (now := self.experiment.step.threads or torch.get_num_threads()):
            self.say(f"note: {now} threads, and {threads} before: sums are rounded in another order from here on")
        for name, value in saved.weights.items():
            mine[name].copy_(value)
        self.optimizer.resume(saved.optimizer)
        self.source.resume(state["data"], force=force)
        self.step, self._skipped = saved.step, int(state.get("skipped", 0))
        self.log.cut(saved.step)

    @contextlib.contextmanager
    def _stoppable(self) -> Iterator[None]:
        """The first SIGTERM or Ctrl-C ends the run after the step that is being computed; a second one at once."""

        def asked(number: int, _: Any) -> None:
            self._signals += 1
            if self._signals > 1:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self.say(f"{signal.Signals(number).name}: this step is finished and saved; once more to exit at once")

        try:
            before = {number: signal.signal(number, asked) for number in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not in the main thread: somebody else's to handle
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


# ── parts of it ─────────────────────────────────────────────────────────────────────────────────────────────────────


def cut(units: Sequence[Unit], max_tokens: int) -> Iterator[list[Unit]]:
    """A step in parts of at most `max_tokens`, in its order; a unit that alone has more is a part by itself."""
    part: list[Unit] = []
    tokens = 0
    for unit in units:
        length = sum(map(len, unit))
        if part and tokens + length > max_tokens:
            yield part
            part, tokens = [], 0
        part.append(unit)
        tokens += length
    if part:
        yield part


def seeded(seed: int, step: int, purpose: int = 0) -> None:
    """Set every source of random numbers to what it is for this step of this run, wherever the run began."""
    state = np.random.SeedSequence([seed, step, purpose]).generate_state(3, np.uint64)
    torch.manual_seed(int(state[0] >> np.uint64(1)))
    random.seed(int(state[1]))
    np.random.seed(int(state[2] & np.uint64(0xFFFFFFFF)))  # noqa: NPY002  # for objectives that draw from it


@contextlib.contextmanager
def _settings(experiment: Experiment) -> Iterator[None]:
    """Threads and algorithms, on which the last bit of a sum depends, as they are for the run alone."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    filled = deterministic.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what CUDA needs to be deterministic
    torch.set_num_threads(experiment.step.threads or threads)
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = False  # it would write all new memory twice
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)
        deterministic.fill_uninitialized_memory = filled


@contextlib.contextmanager
def blocks_again(model: LanguageModel, on: bool) -> Iterator[None]:
    """Keep the inputs of blocks alone, and compute what is in them once more when the gradient needs it."""
    wrapped = model.blocks if on else []
    if on:
        from torch.utils.checkpoint import checkpoint

        for block in wrapped:
            plain = block.forward

            def again(*args: Any, plain: Any = plain, **kwargs: Any) -> Any:
                return checkpoint(plain, *args, use_reentrant=False, **kwargs)

            block.forward = again
    try:
        yield
    finally:
        for block in wrapped:
            del block.forward  # the class's own again


def _peak_memory(model: Any) -> int:
    """Bytes: of the process at most so far, or of the device."""
    device = model.device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class Log:
    """What happened, an object a line, in the order in which it did. Without a path it is kept in memory alone."""

    def __init__(self, path: Path | None):
        self._path = path
        self.entries: list[dict[str, Any]] = []

    def add(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        if self._path is not None:
            try:
                with open(self._path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # the run is worth more than its log
                    raise TrainingError(f"cannot write {self._path}: {error.strerror}") from error

    def sync(self) -> None:
        """On the disk before the checkpoint that it belongs to."""
        if self._path is not None and self._path.exists():
            with open(self._path, "rb") as file:
                os.fsync(file.fileno())

    def cut(self, step: int) -> None:
        """Read what was written up to a step, and forget what came after: it will come again."""
        if self._path is None or not self._path.exists():
            return
        for line in self._path.read_bytes().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the process died while it wrote this line
                continue
            if isinstance(entry, dict) and entry.get("step", 0) <= step and entry.get("event") != "stopped":
                self.entries.append(entry)
        replace_bytes(self._path, "".join(json.dumps(entry) + "\n" for entry in self.entries).encode())

    def last_evaluation(self) -> dict[str, float]:
        return next((e["held_out"] for e in reversed(self.entries) if "held_out" in e), {})


def curve(entries: Sequence[Mapping[str, Any]], title: str) -> str | None:
    """The losses of a log, and under them the rate, as SVG; None: there is nothing to draw."""
    losses = [(e["step"], e["loss"]) for e in entries if "loss" in e and math.isfinite(e["loss"])]
    held_out = [(e["step"], e["held_out"]["loss"]) for e in entries if "held_out" in e]
    held_out = [(step, loss) for step, loss in held_out if math.isfinite(loss)]
    rates = [(e["step"], e["rate"]) for e in entries if "rate" in e]
    if not losses:
        return None
    drawn = [curves.Curve("training", thinned(losses))]
    if held_out:
        drawn.append(curves.Curve("held out", held_out))
    panels = [
        curves.Panel("loss", drawn, lambda y: f"{y:.3g}", from_zero=False),
        curves.Panel("learning rate", [curves.Curve("training", thinned(rates))], lambda y: f"{y:.2g}"),
    ]
    each = math.ceil(len(losses) / POINTS)
    notes = [f"training: means of {each} steps"] if each > 1 else []
    return curves.draw(panels, title=title, x_label="steps", notes=notes, logarithmic=False)


POINTS = 400  # of a curve: a picture is no wider


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `POINTS`, each the mean of as many neighbours, at the last of them."""
    each = math.ceil(len(points) / POINTS)
    groups = [points[i : i + each] for i in range(0, len(points), each)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]
