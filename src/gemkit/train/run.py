"""A run: from an experiment to a folder that holds everything about it, and at the end the model itself.

    runs/x/
        experiment.toml    what was asked for, with everything that was left out
        log.jsonl          an object for each step, evaluation and set of samples
        curve.svg, .png    the losses, drawn (with the extra `plot`)
        checkpoints/       the newest few, see `checkpoint`
        README.md          the model card             ┐
        config.json, model.safetensors, tokenizer ... ├ when it is finished: `gemkit chat -m runs/x`
        or adapter_config.json, adapter_model...      ┘ for an adapter, in PEFT's layout

`Run.start` opens headers and data, so that faults are reported at once; `plan` estimates; `train` loads weights.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gemkit import family
from gemkit import generate as loop
from gemkit import text as formats
from gemkit.adapters import lora, saved
from gemkit.adapters.resolve import find
from gemkit.errors import ConfigError, TrainingError
from gemkit.executors.torch import TorchExecutor
from gemkit.family import Prompt
from gemkit.generate import Request
from gemkit.memory import available_memory
from gemkit.nn import LanguageModel, build
from gemkit.text import Tokenizer
from gemkit.text.vocabulary import IMAGE
from gemkit.train import OBJECTIVES, feed, objectives
from gemkit.train import experiment as settings
from gemkit.train.checkpoint import FileCheckpoints, Saved, replace_bytes
from gemkit.train.data import ControlTokenizer, Data, share
from gemkit.train.estimate import Plan, choose, flops_per_second, predict
from gemkit.train.experiment import Experiment
from gemkit.train.fingerprint import digest, fingerprint
from gemkit.train.initialise import new_module
from gemkit.train.log import Progress
from gemkit.train.loop import Outcome, Trainer
from gemkit.train.new_model import new_model, new_tokenizer
from gemkit.train.objective import Objective
from gemkit.train.objectives import judges
from gemkit.train.process import Process
from gemkit.train.tables import to_tables, to_toml
from gemkit.weights.checkpoint import Checkpoint
from gemkit.weights.export.hf import save_hf
from gemkit.weights.load import load_module
from gemkit.weights.model_card import card, new_card
from gemkit.weights.quantize import kind_of

MAX_LENGTH = 1024
EXPERIMENT, LOCK = "experiment.toml", ".lock"
_DTYPES = {"": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
Say = Callable[[str], Any]


@dataclass
class Run:
    """An experiment whose files are open. A context manager."""

    experiment: Experiment  # with nothing left out
    decoder: family.DecoderConfig
    vision: family.Modality | None
    tokenizer: Tokenizer
    prompts: tuple[Prompt, ...]  # what the model will have been trained to answer
    label: str
    checkpoint: Checkpoint | None  # None: the model is new
    data: Data
    held_out: Data | None
    objective: Objective
    steps: int
    folder: Path | None  # None: nothing is written

    @classmethod
    def start(cls, experiment: Experiment, folder: str | os.PathLike[str] | None) -> Run:
        """Open what an experiment names, and check that it fits together.

        Raises:
            GemkitError: one of its kinds, before anything is loaded.
        """
        if not experiment.objective:
            raise ConfigError(f"no objective: one of {', '.join(OBJECTIVES)}")
        for name, asked in (("model.dtype", experiment.model.dtype), ("save.dtype", experiment.save.dtype)):
            if asked not in _DTYPES:
                raise ConfigError(f"{name}={asked!r} is not one of float32, bfloat16")
        checkpoint, tokenizer, label = None, None, "a new model"
        if experiment.model.new:
            tokenizer = new_tokenizer(experiment.model.tokenizer, places="vision" in experiment.model.new)
            decoder, vision = new_model(experiment.model.new, len(tokenizer))
            if vision is not None:
                vision = replace(vision, placeholder=tokenizer.id(IMAGE))
            prompts: tuple[Prompt, ...] = ("complete",)
        else:
            checkpoint = find(experiment.model.name or None)
            decoder, vision, label = checkpoint.decoder, checkpoint.vision, checkpoint.label
            tokenizer, prompts = checkpoint.tokenizer, checkpoint.prompts
        try:
            data, held_out = feed.opened(experiment)
            if not experiment.data.max_length:
                longest = min(MAX_LENGTH, decoder.max_context)
                experiment = replace(experiment, data=replace(experiment.data, max_length=longest))
            if experiment.data.max_length > decoder.max_context:
                raise ConfigError(
                    f"data.max_length={experiment.data.max_length} is beyond the {decoder.max_context} tokens that "
                    f"{label} was trained to see"
                )
            optimizer = settings.published(experiment.optimizer, decoder, vision, new=checkpoint is None)
            experiment = replace(experiment, optimizer=optimizer)
            reads = ControlTokenizer(tokenizer) if experiment.data.control else tokenizer
            objective = objectives.make(experiment, reads, vision, data.form)
            steps = experiment.steps or feed.count_steps(experiment, data, objective)
            threads = experiment.step.threads or torch.get_num_threads()
            experiment = replace(experiment, steps=steps, step=replace(experiment.step, threads=threads))
            prompts = _answers(prompts, objective, data)
            where = None if folder is None else Path(folder).expanduser().absolute()
            return cls(
                experiment, decoder, vision, tokenizer, prompts, label, checkpoint, data, held_out, objective, steps,
                where,
            )  # fmt: skip
        except BaseException:
            if checkpoint is not None:
                checkpoint.__exit__()
            raise

    @classmethod
    def resume(
        cls, folder: str | os.PathLike[str], change: Callable[[Experiment], Experiment] = lambda kept: kept
    ) -> Run:
        """Open a run that was begun, its experiment changed, if at all, in what a checkpoint does not depend on."""
        path = Path(folder).expanduser()
        if not (path / EXPERIMENT).is_file():
            raise ConfigError(f"{folder} holds no run: there is no {EXPERIMENT} in it")
        return cls.start(change(settings.read(path / EXPERIMENT)), path)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        if self.checkpoint is not None:
            self.checkpoint.__exit__()

    def notes(self) -> list[str]:
        """How the data is understood, in lines."""
        uses = getattr(self.objective, "fields", ())
        return [*self.data.account(self.tokenizer, as_control=self.experiment.data.control, uses=uses)]

    # ── before ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def plan(self) -> Plan:
        """The estimate of its cost.

        Raises:
            ConfigError: if it cannot fit, with the setting that would.
        """
        on_cpu = torch.device(self.experiment.model.device).type == "cpu"
        return choose(self.experiment, self._plan, available_memory() if on_cpu else None, quantizes=True)

    def _plan(self, experiment: Experiment, checkpointing: bool) -> Plan:
        return predict(
            experiment,
            self.decoder,
            self.vision,
            lambda module: _prepare(module, experiment),
            dtype=self.dtype,
            stored=self._stored(experiment),
            checkpointing=checkpointing,
            models=1 + objectives.others(self.objective, experiment),
        )

    @property
    def dtype(self) -> torch.dtype:
        """That the model is computed in."""
        if (dtype := _DTYPES[self.experiment.model.dtype]) is not None:
            return dtype
        stored = () if self.checkpoint is None else (e.dtype for e in self.checkpoint.reader.entries.values())
        return torch.bfloat16 if "BF16" in stored else torch.float32

    def _stored(self, experiment: Experiment) -> int | None:
        """Bytes of the weights where they stay quantized; None where all are dense."""
        if not experiment.lora.rank or self.checkpoint is None:
            return None
        shapes = family.parameters(self.decoder, self.vision)
        if experiment.model.weights:
            with torch.device("meta"):
                module = build(self.decoder, self.vision)
            bits = 0.0
            for name, shape in shapes:
                kind = kind_of(module, name, experiment.model.weights)  # type: ignore[arg-type]  # checked when loaded
                bits += math.prod(shape) * (8 * self.dtype.itemsize if kind is None else kind.bits_per_weight)
            return int(bits / 8)
        entries = self.checkpoint.reader.entries.values()
        if all(entry.dtype in ("F32", "F16", "BF16") for entry in entries):
            return None
        return sum(entry.nbytes for entry in entries)

    def judge(self, function: judges.Judge) -> None:
        """Let a function of yours say how good an answer is.

        Raises:
            ConfigError: if nothing is judged here.
        """
        if "judge" not in self.objective.needs:
            raise ConfigError(f"{self.objective.name} judges no answers: a reward is for rl")
        self.objective.judge = function  # type: ignore[attr-defined]  # as its needs say

    def rate(self) -> float:
        """Operations that this machine does in a second, measured for a moment."""
        return flops_per_second(
            self.decoder, self.experiment.step.microbatch_tokens, self.dtype, self.experiment.model.device
        )

    # ── training ────────────────────────────────────────────────────────────────────────────────────────────────────

    def train(
        self,
        *,
        go_on: bool = False,
        force: bool = False,
        on_step: Callable[[Progress], Any] = lambda _: None,
        say: Say = lambda _: None,
        progress: Callable[[int, int], Any] | None = None,
        process: Process | None = None,
    ) -> Outcome:
        """Load, train to the end or to a signal, and save the model when the end is reached.

        Args:
            go_on: from the newest checkpoint of the folder.
            force: even if the data or the model has changed since.
            on_step, say: are told how steps went, and what else happens.
            progress: is called with (bytes read, bytes in all) while weights are loaded.
            process: this process among those of the run. None: the only one.

        Raises:
            TrainingError: if numbers are not finite, or a checkpoint is of another run.
        """
        saved: Saved | None = None
        process = process or Process(device=self.experiment.model.device)
        for line in self.notes():
            say(f"data: {line}")
        plan = self.plan()  # what is refused leaves no folder behind
        with self._alone(process):
            step = replace(self.experiment.step, activation_checkpointing="on" if plan.checkpointing else "off")
            computed = replace(self.experiment, step=step)
            if self.folder is not None:
                checkpoints = FileCheckpoints(self.folder / "checkpoints", self.experiment.save.keep)
                if not go_on:
                    if process.main:
                        self._begin(self.folder)
                elif checkpoints.steps():
                    saved = checkpoints.newest()
                else:  # it was killed before its first checkpoint
                    say("there is no checkpoint yet: the run begins anew")
                    if process.main:
                        (self.folder / "log.jsonl").unlink(missing_ok=True)
            module = self._load(progress)
            account = _prepare(module, self.experiment)
            if account is not None:
                say(str(account))
            objectives.attach(self.objective, self.experiment, module)
            source = feed.steps(self.experiment, self.data, self.objective, process=process)
            held_out = feed.held_out(self.experiment, self.held_out, self.objective)
            trainer = Trainer(
                module,
                self.objective,
                source,
                computed,
                self.steps,
                folder=self.folder,
                origin=self.origin(),
                held_out=share(held_out, process.rank, process.world),
                sample=self._sampler(module) if self.experiment.monitor.samples else None,
                on_step=on_step,
                say=say,
                process=process,
            )
            if saved is not None:
                trainer.resume(saved, force=force)
                say(f"going on from step {saved.step} of {self.steps}")
            outcome = trainer.run()
            for line in (source.report(), *self.data.bad[:3]):
                say(f"data: {line}")
            if not outcome.stopped and self.folder is not None and process.main:
                self._save(module, outcome, self.folder)
            return outcome

    @contextlib.contextmanager
    def _alone(self, process: Process) -> Iterator[None]:
        """No two runs train in one folder. The lock is its main process's: it is gone when that dies, however it
        does."""
        if self.folder is None or not process.main:
            yield
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{self.folder} cannot be the folder of a run: {error.strerror}") from error
        with open(self.folder / LOCK, "w", encoding="ascii") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise TrainingError(f"another process is training in {self.folder}") from error
            yield

    def _begin(self, folder: Path) -> None:
        if any(not path.name.startswith(".") for path in folder.iterdir()):
            raise ConfigError(
                f"{folder} exists and is not empty: --resume {folder} goes on with the run in it, or take a new folder"
            )
        replace_bytes(folder / EXPERIMENT, to_toml(self.experiment).encode())

    def _load(self, progress: Callable[[int, int], Any] | None) -> LanguageModel:
        model = self.experiment.model
        if self.checkpoint is None:
            return new_module(
                self.decoder, self.vision, seed=self.experiment.seed, dtype=self.dtype, device=model.device
            )
        module, _ = load_module(
            self.checkpoint,
            dtype=self.dtype,
            device=model.device,
            quantized=self.experiment.lora.rank > 0,
            weights=model.weights or None,  # type: ignore[arg-type]  # checked by it
            progress=progress,
        )
        return module

    def _sampler(self, module: LanguageModel) -> Callable[[], list[tuple[str, str]]]:
        if self.vision is not None:
            raise ConfigError("monitor.samples: a model that sees images is not asked for samples; look at held_out")
        asked = self.experiment.monitor
        made = [
            formats.chat(self.tokenizer, [{"role": "user", "content": prompt}])
            if "chat" in self.prompts
            else formats.complete(self.tokenizer, prompt)
            for prompt in asked.samples
        ]
        requests = [Request(p.ids, max_tokens=asked.sample_tokens, stop_ids=p.stop_ids) for p in made]

        def sample() -> list[tuple[str, str]]:
            results = loop.complete(TorchExecutor(module), requests, text_stream=self.tokenizer.stream)
            return [(prompt, result.text) for prompt, result in zip(asked.samples, results, strict=True)]

        return sample

    # ── what it is made of, and what becomes of it ──────────────────────────────────────────────────────────────────

    def origin(self) -> dict[str, Any]:
        """Settings that a checkpoint must agree with to be continued: others would give other numbers."""
        asked = to_tables(self.experiment)
        kept = ("objective", "steps", "seed", "lora", "optimizer", "options")
        return {
            "the model": fingerprint(self.decoder, self.vision, self.checkpoint),
            "the tokenizer": digest(self.tokenizer.vocabulary.pieces),
            "the turns": digest([*formats.templates_of(self.tokenizer).values()]),
            "the data": self.data.fingerprint,
            "model.freeze": list(self.experiment.model.freeze),
            "model.dtype": str(self.dtype),
            "model.weights": self.experiment.model.weights,
            "data.batch": [
                self.experiment.data.batch_size, self.experiment.data.batch_tokens, self.experiment.data.max_length
            ],
            "data.control": self.experiment.data.control,
            "step.microbatch_tokens": self.experiment.step.microbatch_tokens,
            **{name: asked[name] for name in kept},
        }  # fmt: skip

    def _save(self, module: LanguageModel, outcome: Outcome, folder: Path) -> None:
        """The model into the run folder, its configuration last: without that it is no model yet."""
        work = folder / ".model"
        shutil.rmtree(work, ignore_errors=True)
        module.eval()
        if self.experiment.lora.rank:
            assert self.checkpoint is not None
            saved.save(
                module,
                work,
                base=self.checkpoint.place.name,
                named=self.checkpoint.display_name,
                prompts=self.prompts,
                templates=formats.templates_of(self.tokenizer),
            )
        else:
            dtype = _DTYPES[self.experiment.save.dtype]
            said = {} if self.checkpoint is None else self.checkpoint.generation.given
            save_hf(module, work, tokenizer=self.tokenizer, prompts=self.prompts, dtype=dtype, generation=said)
        (work / "README.md").write_text(self._card(outcome, folder.name), encoding="utf-8")
        last = ("config.json", "adapter_config.json")
        for path in sorted(work.iterdir(), key=lambda path: (path.name in last, path.name)):
            os.replace(path, folder / path.name)
        work.rmdir()

    def _card(self, outcome: Outcome, title: str) -> str:
        e = self.experiment
        trained = f"LoRA of rank {e.lora.rank}" if e.lora.rank else "all weights"
        lines = [
            f"Trained with gemkit: {e.objective}, {trained}, {outcome.step:,} steps, AdamW with a rate of "
            f"{e.optimizer.learning_rate:g} ({e.optimizer.decay}), seed {e.seed}.",
            *([] if outcome.loss is None else [f"Loss of the last step: {outcome.loss:.4f}."]),
            *(f"Held out: {name} {value:.4f}." for name, value in outcome.held_out.items()),
            f"The whole experiment is in `{EXPERIMENT}`, its losses in `log.jsonl` and `curve.svg`.",
        ]
        data = [f"`{os.path.basename(e.data.train)}`: {len(self.data):,} records, SHA-256 {self.data.fingerprint}"]
        if self.held_out is not None:
            data.append(f"`{os.path.basename(e.data.held_out)}`, held out: {len(self.held_out):,} records")
        if self.checkpoint is None:
            return new_card(title, lines, data)
        return card(title, self.checkpoint.display_name, lines, adapter=bool(e.lora.rank), data=data)


def _prepare(module: LanguageModel, experiment: Experiment) -> lora.Account | None:
    """Say which weights are trained: adapters, or all but those that are frozen."""
    e = experiment.lora
    if e.rank:
        account = lora.enable_lora(
            module,
            e.rank,
            e.alpha,
            list(e.targets) or None,
            rule=e.rule or "lora",
            dropout=e.dropout,
            use_dora=e.use_dora,
            use_rslora=e.use_rslora,
            modules_to_save=e.modules_to_save,
            seed=experiment.seed,
        )
    else:
        account = None
        module.requires_grad_(True)
    names = [name for name, _ in module.named_parameters()]
    for beginning in experiment.model.freeze:
        if not any(name.startswith(beginning) for name in names):
            raise ConfigError(f"model.freeze={beginning!r} is the beginning of no weight's name")
    for name, parameter in module.named_parameters():
        if name.startswith(experiment.model.freeze or ("\0",)):
            parameter.requires_grad_(False)
    return account


def _answers(prompts: tuple[Prompt, ...], objective: Objective, data: Data) -> tuple[Prompt, ...]:
    """Prompt formats that the model answers after it has learned from this data."""
    learned: Prompt | None = None
    record: Mapping[str, Any] = data[0]
    if "chat" in data.forms or isinstance(record.get("prompt"), list):
        learned = "chat"
    elif objective.name == "infill":
        learned = "infill"
    return prompts if learned is None or learned in prompts else (*prompts, learned)
