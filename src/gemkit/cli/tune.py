"""`gemkit tune`: train a model, or adapters of one; what comes out is a folder that -m opens."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gemkit.cli.options import verb
from gemkit.cli.output import Progress, print_json, put, rewrite, say
from gemkit.errors import ConfigError
from gemkit.train import OBJECTIVES

if TYPE_CHECKING:
    from gemkit.train.experiment import Experiment
    from gemkit.train.log import Progress as StepProgress
    from gemkit.train.run import Run

_EXAMPLES = """\
  gemkit tune sft --data answers.jsonl --lora 8 -o runs/first
  gemkit tune sft --data answers.jsonl --held-out others.jsonl --lora 8 --set optimizer.learning_rate=1e-4 -o runs/b
  gemkit tune dpo -m gemma-2-2b-it --data pairs.jsonl --lora 16 --plan
  gemkit tune pretrain --config tiny.toml --data texts/ -o runs/tiny
  gemkit tune rl --data sums.jsonl --reward my_rewards:correct --lora 8 -o runs/sums
  gemkit tune --resume runs/first"""

_FIELDS = {  # an option and the field that it sets
    "model": "model.name",
    "data": "data.train",
    "held_out": "data.held_out",
    "lora": "lora.rank",
    "steps": "steps",
    "epochs": "epochs",
    "lr": "optimizer.learning_rate",
    "batch_size": "data.batch_size",
    "max_length": "data.max_length",
    "form": "data.form",
    "control": "data.control",
    "dtype": "model.dtype",
    "device": "model.device",
    "weights": "model.weights",
    "seed": "seed",
    "teacher": "options.teacher",
}


def add(subparsers: Any) -> None:
    parser = verb(subparsers, "tune", "train a model, or adapters of one", _EXAMPLES)
    parser.add_argument("objective", nargs="?", choices=OBJECTIVES, help=f"what is learned: {', '.join(OBJECTIVES)}")
    parser.add_argument("-o", "--output", metavar="FOLDER", help="a new folder for the run; gemkit -m opens it after")
    parser.add_argument("--resume", metavar="FOLDER", help="go on with the run in this folder")
    parser.add_argument("--plan", action="store_true", help="say what it would take, and train nothing")
    group = parser.add_argument_group("experiment")
    group.add_argument("--config", metavar="FILE", help="a TOML file; what is given here comes after it")
    group.add_argument("-m", "--model", metavar="MODEL", help="a member, hub id, folder or file (default: the starter)")
    group.add_argument(
        "--data", metavar="PATH", help="a file (.jsonl, .json, .csv, .parquet), a folder, or hub:owner/name"
    )
    group.add_argument("--held-out", metavar="PATH", help="the same, to evaluate on")
    group.add_argument("--form", metavar="FORM", help="of the records, such as text (default: as each of them shows)")
    group.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="FIELD=COLUMN",
        help="a column of the data by the name of a field, such as prompt=question_en (repeatable)",
    )
    group.add_argument(
        "--control",
        action="store_true",
        default=None,
        help="text that spells a control token, like <start_of_turn>, is trained as that token",
    )
    group.add_argument("--lora", type=int, metavar="RANK", help="train adapters of this rank instead of all weights")
    group.add_argument("--steps", type=int, metavar="N", help="default: as many as the epochs take")
    group.add_argument("--epochs", type=float, metavar="X", help="passes over the data (default: 1)")
    group.add_argument("--lr", type=float, metavar="X", help="highest learning rate (default: as published)")
    group.add_argument("--batch-size", type=int, metavar="N", help="examples a step (default: 8)")
    group.add_argument(
        "--max-length", type=int, metavar="N", help="tokens of an example at most (default: 1024, if it can)"
    )
    group.add_argument("--dtype", metavar="TYPE", help="bfloat16 or float32 (default: the file's own)")
    group.add_argument("--device", metavar="NAME", help="a torch device (default: cpu)")
    group.add_argument("--weights", choices=("int8", "int4"), help="with --lora: quantize what is not trained")
    group.add_argument("--teacher", metavar="MODEL", help="distill: what to learn from")
    group.add_argument(
        "--reward",
        metavar="MODEL",
        help="rl: a reward model, or module:function of yours, which is then imported",
    )
    group.add_argument("--seed", type=int, metavar="N", help="of everything that is drawn (default: 0)")
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="any field of the experiment, such as step.microbatch_tokens=4096 or options.beta=0.2 (repeatable)",
    )
    group.add_argument("--force", action="store_true", help="with --resume: although model, data or settings changed")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")
    parser.set_defaults(run=run)


def experiment(args: argparse.Namespace) -> Experiment:
    """The experiment of a command line: the file, then the options, then --set."""
    from gemkit.train import experiment as settings

    made = settings.Experiment() if args.config is None else settings.read(args.config)
    given = [] if args.objective is None else [("objective", args.objective)]
    return _changed(settings.with_fields(made, given), args)


def _changed(made: Experiment, args: argparse.Namespace) -> Experiment:
    from gemkit.train import experiment as settings

    return settings.set_fields(settings.with_fields(made, _given(args)), args.set)


def _given(args: argparse.Namespace) -> list[tuple[str, Any]]:
    given = [(field, getattr(args, name)) for name, field in _FIELDS.items() if getattr(args, name) is not None]
    for assignment in args.map:
        name, equals, column = assignment.partition("=")
        if not (name and equals and column):
            raise ConfigError(f"--map {assignment}: write FIELD=COLUMN, such as prompt=question_en")
        given.append((f"data.map.{name}", column))
    if args.reward is not None and not _is_function(args.reward):
        given.append(("options.reward", args.reward))
    return given


def _is_function(reward: str | None) -> bool:
    return reward is not None and ":" in reward and "/" not in reward


def run(args: argparse.Namespace) -> int:
    with _opened(args) as the_run:
        if _is_function(args.reward):  # code is named at the command line alone, never by a file
            from gemkit.train.objectives import judges

            the_run.judge(judges.function(args.reward))
        if args.plan:
            return _plan(args, the_run)
        talk = _Talk(quiet=args.quiet)
        with Progress(enabled=not args.quiet) as progress:
            outcome = the_run.train(
                go_on=args.resume is not None, force=args.force, on_step=talk.step, say=talk.line, progress=progress
            )
        talk.close()
        folder = str(the_run.folder)
        if args.json:
            print_json({"folder": folder, **asdict(outcome)})
        elif outcome.stopped:
            put(f"stopped after step {outcome.step} of {outcome.steps}; gemkit tune --resume {folder} goes on")
        else:
            put(f"{folder}: {outcome.step} steps" + ("" if outcome.loss is None else f", loss {outcome.loss:.4f}"))
    return 0


def _opened(args: argparse.Namespace) -> Run:
    """The run that is asked for, its files open and nothing loaded."""
    if args.resume is not None:
        if args.objective or args.config or args.output:
            raise ConfigError(
                f"--resume {args.resume} goes on with what is in the folder; --set FIELD=VALUE changes it"
            )
        from gemkit.train.run import Run

        return Run.resume(args.resume, lambda kept: _changed(kept, args))
    asked = experiment(args)
    if args.output is None and not args.plan:
        raise ConfigError("-o FOLDER: where the run is kept")
    from gemkit.train.run import Run

    return Run.start(asked, args.output)


def _plan(args: argparse.Namespace, the_run: Run) -> int:
    from gemkit.memory import available_memory

    plan, rate, available = the_run.plan(), the_run.rate(), available_memory()
    if args.json:
        figures = {"peak": plan.peak, "available": available, "seconds_per_step": plan.seconds(rate), "flop_s": rate}
        data = {"records": len(the_run.data), "dialects": dict(the_run.data.dialects), "notes": the_run.notes()}
        print_json({"model": the_run.label, "steps": the_run.steps, "data": data, **asdict(plan), **figures})
        return 0
    put(f"{the_run.label}: {the_run.objective.name} on {len(the_run.data):,} records, {the_run.steps:,} steps")
    for line in the_run.notes():
        put(f"data: {line}")
    print("\n".join(plan.lines(rate, available)))
    return 0


class _Talk:
    """One line that is rewritten on a terminal, plain lines in a file."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet, self._on_terminal, self._shown = quiet, sys.stderr.isatty(), False

    def step(self, progress: StepProgress) -> None:
        if self._on_terminal and not self._quiet:
            rewrite(str(progress))
            self._shown = True
        else:
            self.line(str(progress))

    def line(self, text: str) -> None:
        self.close()
        if not self._quiet:
            say(text)

    def close(self) -> None:
        """Leave the terminal at the beginning of a line, under the last step."""
        if self._shown:
            sys.stderr.write("\n")
            self._shown = False
