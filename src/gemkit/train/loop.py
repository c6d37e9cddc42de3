"""The one loop that trains, for every objective.

Nothing is remembered between steps but weights, optimizer, the position in the data and the number of the step, from
which its random numbers come (`step.py`); so a checkpoint holds all there is, and a run that was killed goes on to the
same bits.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from gemkit.errors import MissingExtraError, NoSpaceError, TrainingError
from gemkit.nn import LanguageModel
from gemkit.train import nonfinite
from gemkit.train import step as steps_
from gemkit.train.batching import ExampleGroup
from gemkit.train.checkpoint import Checkpoints, FileCheckpoints, Saved, replace_bytes
from gemkit.train.experiment import Experiment
from gemkit.train.log import Log, Progress, draw
from gemkit.train.objective import Objective
from gemkit.train.optimizer import KIND, Optimizer
from gemkit.train.process import Process
from gemkit.train.signals import StopSignals

_PICTURE_EVERY = 60  # seconds from a checkpoint's picture of the curve to the next: drawing takes up to one


class Source(Protocol):
    """Where the units of each step come from (`data.Steps` is one)."""

    def __iter__(self) -> Iterator[Sequence[ExampleGroup]]: ...

    def state(self) -> Mapping[str, Any]:
        """The position after the step that was handed out last, for JSON."""
        ...

    def resume(self, state: Mapping[str, Any], *, force: bool = False) -> None:
        """Go on from there; with `force` even if the data is another."""
        ...


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
        model: an `nn.LanguageModel`, its weights loaded.
        objective: the way to learn.
        source: the units of each step, of which this process has its share.
        experiment: its `optimizer` has nothing left out.
        steps: of the whole run.
        parameters: the weights that are trained; None: all that take a gradient.
        folder: of checkpoints, log and curve, which the main process writes; None: nothing is written.
        origin: by name, the things that a checkpoint must agree with to go on from it: the model, the data.
        held_out: units that are never trained on.
        sample: answers to prompts at some step, for people.
        on_step, say: are told how each logged step went, and other events.
        process: this process among those of the run. None: the only one.
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
        held_out: Sequence[ExampleGroup] = (),
        sample: Callable[[], Sequence[tuple[str, str]]] | None = None,
        on_step: Callable[[Progress], Any] = lambda _: None,
        say: Callable[[str], Any] = lambda _: None,
        process: Process | None = None,
    ):
        if parameters is None:
            parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.process = Process(device=model.device) if process is None else process
        self.model, self.objective, self.source = model, objective, source
        self.experiment, self.steps, self.step = experiment, steps, 0
        self.optimizer = Optimizer(parameters, experiment.optimizer, steps)
        self.origin = dict(origin or {})
        self.held_out, self.sample = list(held_out), sample
        main = self.process.main
        self.on_step, self.say = (on_step, say) if main else (lambda _: None, lambda _: None)
        # absolute: a run outlives the folder that it was started in
        self.folder = None if folder is None else Path(folder).absolute()
        self.checkpoints: Checkpoints | None = None
        if self.folder is not None:
            self.checkpoints = FileCheckpoints(self.folder / "checkpoints", experiment.save.keep, self.process)
        self.log = Log(self.folder / "log.jsonl" if self.folder is not None and main else None)
        self._skipped = 0  # steps in a row that were left out
        self._signals = StopSignals(lambda text: self.say(text))
        self._unsaved = False  # a checkpoint that the disk had no room for
        self._draws, self._drawn = True, time.monotonic()

    # ── the run ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> Outcome:
        """Train to the end, or until a signal asks to stop.

        Raises:
            TrainingError: for a loss or a gradient that is not finite, with the name of what made it; the last good
                checkpoint is then the newest.
        """
        monitor, save = self.experiment.monitor, self.experiment.save
        start, first, loss = time.monotonic(), self.step, None
        again = self.experiment.step.activation_checkpointing == "on"
        with (
            steps_.reproducible(self.experiment),
            steps_.activation_checkpointing(self.model, again),
            self._signals,
        ):
            if self.step == 0 and self.held_out:
                self.evaluate()
            batches, saved, stopping = iter(self.source), False, False
            while self.step < self.steps and not (stopping := self._stopping()):
                began = time.monotonic()
                units = next(batches, None)
                if units is None:
                    raise TrainingError(f"the data ended after {self.step} of {self.steps} steps")
                progress = self._step(units, began)
                if progress is not None:
                    loss = progress.loss
                passed = self.step - first
                if progress is not None and (self.step % monitor.log_every == 0 or self.step == self.steps):
                    left = (time.monotonic() - start) / passed * (self.steps - self.step)
                    self.on_step(replace(progress, left=left))
                last = self.step == self.steps or self._stopping()
                if self.held_out and (_due(self.step, monitor.evaluate_every) or self.step == self.steps):
                    self.evaluate()
                if self.sample and (_due(self.step, monitor.sample_every) or self.step == self.steps):
                    self._show_samples()
                if saved := last or self._unsaved or _due(self.step, save.every):
                    self.save(final=last)
            if stopping and (self._unsaved or not saved):  # the signal came after the last step was looked at
                self.save(final=True)
        self.draw()
        return Outcome(self.step, self.steps, loss, self.log.last_evaluation(), self.step < self.steps)

    def _stopping(self) -> bool:
        """True once any process was asked to stop: all of them leave after the same step."""
        return self.process.any(self._signals.count > 0)

    def _step(self, units: Sequence[ExampleGroup], began: float) -> Progress | None:
        """One step; None if it was left out."""
        found = steps_.compute(
            self.model,
            self.objective,
            units,
            seed=self.experiment.seed,
            step=self.step,
            microbatch_tokens=self.experiment.step.microbatch_tokens,
            process=self.process,
        )
        if not found.size:
            self._leave_out("nothing in it has a weight in the loss")
            return None
        why = found.not_finite
        norm = math.nan if self.process.any(bool(why)) else self.optimizer.grad_norm()
        if not why and not math.isfinite(norm):
            why = f"the loss is {found.loss:.4f}, the norm of its gradient {norm}"
        if why:
            self._refuse(why, found)
            return None
        lr = self.optimizer.step(self.step, norm)
        self._skipped = 0
        self.step += 1
        progress = Progress(
            step=self.step,
            steps=self.steps,
            loss=found.loss,
            lr=lr,
            grad_norm=norm,
            tokens=int(self.process.sum(found.tokens)),
            seconds=time.monotonic() - began,
            peak_memory=steps_.peak_memory(self.model.device),
            metrics=found.metrics,
        )
        self.log.add(progress.entry())
        return progress

    def _refuse(self, why: str, found: steps_.Gradients) -> None:
        """Find what made numbers that are not finite; leave the step out, or stop."""
        self.optimizer.zero_grad()
        steps_.seeded(self.experiment.seed, self.step)

        def loss(units: Sequence[ExampleGroup]) -> Tensor:
            return self.objective.loss(self.model, units).total / found.size

        cause = nonfinite.locate(self.model, found.parts, loss)
        self.optimizer.zero_grad()
        said = f"step {self.step + 1}: {why}: {cause}"
        if self._skipped >= self.experiment.step.skip_nonfinite:
            self.log.add({"step": self.step, "event": "stopped", "why": said})
            kept = self.checkpoints.steps() if self.checkpoints is not None else []
            rest = f"the checkpoint of step {kept[-1]} is kept" if kept else "there is no checkpoint yet"
            raise TrainingError(
                f"{said}. The weights were not changed by it; {rest}. A smaller optimizer.learning_rate or "
                "dtype=float32 may help, and step.skip_nonfinite=N leaves out up to N such steps in a row"
            )
        self._leave_out(f"{why}: {cause}")

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
        """The loss on the held-out units, and the objective's metrics of them."""
        found = steps_.evaluate(
            self.model,
            self.objective,
            self.held_out,
            seed=self.experiment.seed,
            microbatch_tokens=self.experiment.step.microbatch_tokens,
            process=self.process,
        )
        self.log.add({"step": self.step, "held_out": found})
        self.say(f"step {self.step}: held out " + "  ".join(f"{name} {value:.4f}" for name, value in found.items()))
        return found

    def _show_samples(self) -> None:
        assert self.sample is not None
        steps_.seeded(self.experiment.seed, self.step, purpose=3)
        answers = self.sample()
        self.log.add({"step": self.step, "samples": [{"prompt": p, "text": t} for p, t in answers]})
        for prompt, text in answers:
            self.say(f"step {self.step}: {prompt!r} -> {text!r}")

    def draw(self) -> None:
        """The curve of the log, as SVG and as PNG."""
        self._drawn = time.monotonic()
        if self.folder is None or not self.process.main or not self._draws:
            return
        try:
            for kind in ("svg", "png"):
                picture = draw(self.log.entries, self.experiment.objective, kind)
                if picture is not None:
                    replace_bytes(self.folder / f"curve.{kind}", picture)
        except (MissingExtraError, TrainingError) as error:  # neither may end a run that is otherwise well
            self.say(f"the curve is not drawn: {error}")
            self._draws = False

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
            self.checkpoints.save(Saved(self.step, weights, self.optimizer.state_dict(), state))
            self._unsaved = False
        except NoSpaceError as error:
            if final:
                raise
            if not self._unsaved:
                self.log.add({"step": self.step, "event": "not saved", "why": str(error)})
                self.say(f"step {self.step}: {error}; training goes on, and the next step tries again")
            self._unsaved = True
        if time.monotonic() - self._drawn > _PICTURE_EVERY:
            self.draw()

    @torch.no_grad()
    def resume(self, saved: Saved, *, force: bool = False) -> None:
        """Go on from a checkpoint.

        Args:
            force: even if the model or the data are not those that it came from.

        Raises:
            TrainingError: if it is that of another run, by the name of what differs.
        """
        self._expect(saved, force)
        threads, now = saved.state.get("threads"), self.experiment.step.threads or torch.get_num_threads()
        if threads != now:
            self.say(f"note: {now} threads, and {threads} before: sums are rounded in another order from here on")
        for name, value in saved.weights.items():
            self.optimizer.parameters[name].copy_(value)
        self.optimizer.resume(saved.optimizer)
        self.source.resume(saved.state["data"], force=force)
        self.step, self._skipped = saved.step, int(saved.state.get("skipped", 0))
        self.log.cut(saved.step)

    def _expect(self, saved: Saved, force: bool) -> None:
        """Refuse a checkpoint of another run."""
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


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
