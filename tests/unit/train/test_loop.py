"""The loop: exact parts, the same bits after a resume, and a name for every number that is not finite."""

import json
import math
import os
import signal
import threading
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
import torch

from gemkit.adapters.layers import LoRA
from gemkit.errors import MissingExtraError, NoSpaceError, TrainingError
from gemkit.inspect import curves
from gemkit.train import checkpoint, loop
from gemkit.train.experiment import Monitor, Save, Step
from gemkit.train.log import Log, thinned
from gemkit.train.loop import Trainer
from gemkit.train.step import split_microbatches
from support.tiny import VOCAB
from support.training import PLAIN, NextToken, Sequences, example, experiment, module

STEPS = 6


@pytest.fixture(autouse=True)
def few_pictures(request, monkeypatch):
    """Curves are drawn where they are looked at: each takes as long as the rest of a test."""
    if "curve" not in request.node.name:
        monkeypatch.setattr(loop, "draw", lambda *_: None)


def made(model=None, *, steps=STEPS, folder=None, objective=None, source=None, **changes) -> Trainer:
    changes.setdefault("step", Step(microbatch_tokens=24))
    return Trainer(
        module() if model is None else model,
        objective or NextToken(),
        source or Sequences(),
        experiment(**changes),
        steps,
        folder=folder,
        origin={"the data": "d"},
    )


def losses(folder) -> list[tuple]:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(e["step"], e["loss"], e["grad_norm"], e["lr"], e["right"]) for e in entries if "loss" in e]


def weights(of: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in of.model.named_parameters()}


def with_dropout(dtype: torch.dtype = torch.float32):
    """A model with an adapter on one projection that drops a third of its inputs; everything is trained."""
    model = module(dtype=dtype)
    up = model.layers[0].mlp.up_proj
    with torch.random.fork_rng():
        torch.manual_seed(5)
        up.adapters = torch.nn.ModuleDict({"default": LoRA(*reversed(up.weight.shape), 4, 1.0, dropout=0.3).to(dtype)})
        for value in up.adapters.parameters():
            torch.nn.init.normal_(value, std=0.1)
    return model


# ── parts ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["gemma-2-2b", "recurrentgemma-2b"])
def test_a_step_in_parts_has_the_gradient_of_the_whole(name):
    """1, 2, 3 and 6 parts of ragged sequences in float64, to its rounding."""
    found = {}
    for most in (1000, 24, 18, 2):
        model = module(name, layers=3, dtype=torch.float64)
        of = made(model, step=Step(microbatch_tokens=most))
        units = of.source.at(0)
        parts = list(split_microbatches(units, most))
        of.optimizer.step = lambda *_: 0.0
        of._step(units, 0.0)
        found[len(parts)] = of.optimizer.gradients(), of.log.entries[0]
    assert sorted(found) == [1, 2, 3, 6]
    whole, entry = found[1]
    largest = max(grad.abs().max().item() for grad in whole.values())
    for gradients, other in found.values():
        assert gradients.keys() == whole.keys()
        for grad_name, grad in gradients.items():
            assert (grad - whole[grad_name]).abs().max().item() < 1e-13 * largest, grad_name
        assert other["loss"] == pytest.approx(entry["loss"], rel=1e-12)
        assert other["right"] == pytest.approx(entry["right"], rel=1e-6)


def test_parts_keep_units_whole_and_in_order():
    units = [(example(np.arange(length) % VOCAB),) for length in (5, 5, 30, 2, 8, 9)]
    assert [[len(u[0]) for u in part] for part in split_microbatches(units, 12)] == [[5, 5], [30], [2, 8], [9]]
    pair = (example(np.arange(7)), example(np.arange(7)))
    assert [len(part) for part in split_microbatches([pair, pair], 12)] == [1, 1]


def test_blocks_computed_again_give_the_same_bits():
    plain, again = (
        made(with_dropout()),
        made(with_dropout(), step=Step(microbatch_tokens=24, activation_checkpointing="on")),
    )
    assert plain.run().loss == again.run().loss
    assert all(torch.equal(a, b) for a, b in zip(weights(plain).values(), weights(again).values(), strict=True))
    assert not again.model.layers[0].activation_checkpointing  # nothing of it stays


def test_it_learns():
    """One batch by heart: from guessing to nothing."""

    class Same(Sequences):
        def at(self, position):
            return super().at(0)

    of = made(steps=60, source=Same(), optimizer=replace(PLAIN, learning_rate=3e-2, grad_clip=0.0))
    of.run()
    found = [e["loss"] for e in of.log.entries]
    assert found[0] > math.log(VOCAB) - 0.5
    assert found[-1] < 0.3


# ── going on ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_resumed_run_has_the_same_bits(tmp_path, dtype, at):
    """With dropout on, moments, masters, schedule and a held-out evaluation in between that the whole run has not."""
    optimizer = replace(PLAIN, warmup=2.0, decay="cosine")
    whole = made(with_dropout(dtype), folder=tmp_path / "whole", optimizer=optimizer)
    (tmp_path / "whole").mkdir()
    whole.run()

    folder = tmp_path / "parts"
    folder.mkdir()
    first = made(with_dropout(dtype), folder=folder, optimizer=optimizer, save=Save(every=at, keep=9))
    first.run()
    for step in first.checkpoints.steps():
        if step > at:
            checkpoint.remove(first.checkpoints.path(step))
    torch.manual_seed(99)  # what another process would have
    second = made(with_dropout(dtype), folder=folder, optimizer=optimizer, source=Sequences())
    second.held_out = Sequences(seed=7).at(0)
    second.resume(second.checkpoints.newest())
    assert second.step == at
    second.run()
    assert losses(folder) == losses(tmp_path / "whole")
    ours, theirs = weights(second), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_log_is_cut_to_the_checkpoint(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    for step in range(1, 5):
        log.add({"step": step, "loss": 1 / step})
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # killed while it wrote
    again = Log(tmp_path / "log.jsonl")
    again.cut(3)
    assert [e["step"] for e in again.entries] == [1, 2, 3]
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"origin": {"the data": "other"}}, "the data is not what the checkpoint .* d then, other now; --force"),
        ({"origin": {"the model": "m"}}, "the data is not what|the model is not what"),
        ({"objective": "dpo"}, "the checkpoint learns 'pretrain', and this run 'dpo'"),
        ({"kind": "sgd/1"}, "the checkpoint's optimizer is 'sgd/1', and this is 'adamw/1'"),
        ({"model": ("gemma-3-270m", 3)}, r"of another model: layers\.2\..* is not in it"),
        ({"model": ("gemma-2-2b", 2)}, r"of another model: "),
        ({"dtype": torch.bfloat16}, r"torch\.float32 in it, .* torch\.bfloat16 here"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, message):
    before = made(folder=tmp_path, steps=1)
    before.run()
    saved = before.checkpoints.newest()
    model = module(*change.get("model", ("gemma-3-270m", 2)), dtype=change.get("dtype", torch.float32))
    objective = NextToken()
    objective.name = change.get("objective", "pretrain")
    after = made(model, objective=objective)
    after.origin = change.get("origin", after.origin)
    if "kind" in change:
        saved = replace(saved, state={**saved.state, "optimizer": change["kind"]})
    with pytest.raises(TrainingError, match=message):
        after.resume(saved)


def test_force_goes_on_with_other_data(tmp_path):
    before = made(folder=tmp_path, steps=1)
    before.run()
    after = made(steps=2)
    after.origin = {"the data": "other"}
    after.resume(before.checkpoints.newest(), force=True)
    assert after.run().step == 2


# ── signals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(tmp_path, number):
    class Interrupting(NextToken):
        def loss(self, model, units):
            if of.step == 2 and not of._signals.count:
                os.kill(os.getpid(), number)
            return super().loss(model, units)

    said = []
    of = made(folder=tmp_path, objective=Interrupting())
    of.say = said.append
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    outcome = of.run()
    assert (outcome.step, outcome.stopped) == (3, True)
    assert of.checkpoints.steps() == [3]
    assert "once more to exit at once" in said[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    after = made(folder=tmp_path)
    after.resume(after.checkpoints.newest())
    after.run()
    whole = made(folder=tmp_path / "whole")
    (tmp_path / "whole").mkdir()
    whole.run()
    assert losses(tmp_path) == losses(tmp_path / "whole")


def test_outside_the_main_thread_signals_are_left_alone():
    of = made(steps=1)
    thread = threading.Thread(target=of.run)
    thread.start()
    thread.join()
    assert of.step == 1


# ── numbers that are not finite ─────────────────────────────────────────────────────────────────────────────────────


class Poisoned(NextToken):
    """At one step something is not finite."""

    def __init__(self, at: int, what: str, times: int = 1):
        self.at, self.what, self.times = at, what, times

    def loss(self, model, units):
        bad = self.at <= self.of.step < self.at + self.times
        if bad and self.what == "gradient":  # a finite loss, whose gradient is 0 / 0
            loss = super().loss(model, units)
            zero = (model.norm.weight * 0).sum()
            return replace(loss, total=loss.total + torch.sqrt(zero))
        if bad and self.what == "loss" and len(units) > 0:
            loss = super().loss(model, units)
            here = [unit for unit in units if len(unit[0]) == self.length]
            return replace(loss, total=loss.total * (math.inf if here else 1.0))
        return super().loss(model, units)


def poisoned(tmp_path, what, *, at=3, times=1, model=None, **changes):
    objective = Poisoned(at, what, times)
    of = made(model, folder=tmp_path, objective=objective, save=Save(every=2, keep=3), **changes)
    objective.of, objective.length = of, max(len(unit[0]) for unit in of.source.at(at))
    return of


def test_a_loss_that_is_not_finite_stops_the_run_by_the_name_of_its_example(tmp_path):
    of = poisoned(tmp_path, "loss")
    number = [len(unit[0]) for unit in of.source.at(3)].index(of.objective.length) + 1
    with pytest.raises(TrainingError, match=rf"step 4: the loss is inf: the loss of example {number} of the step"):
        of.run()
    assert of.checkpoints.steps() == [2]
    assert "the checkpoint of step 2 is kept" in of.log.entries[-1]["why"] or of.log.entries[-1]["event"] == "stopped"


def test_a_finite_loss_with_a_gradient_that_is_not(tmp_path):
    of = poisoned(tmp_path, "gradient")
    before = None

    def remember(progress):
        nonlocal before
        before = weights(of)

    of.on_step = remember
    with pytest.raises(TrainingError, match=r"norm of its gradient nan: the gradient of norm\.weight is not finite"):
        of.run()
    after = weights(of)
    assert all(torch.equal(before[name], after[name]) for name in before)  # the step was not taken


def test_a_module_that_makes_it_is_named(tmp_path):
    model = module()
    of = made(model, folder=tmp_path)
    down = model.layers[1].mlp.down_proj
    plain = down.forward
    down.forward = lambda x: plain(x).index_fill(0, torch.tensor([7]), math.inf) if of.step == 2 else plain(x)
    with pytest.raises(
        TrainingError, match=r"layers\.1\.mlp\.down_proj \(Linear\) makes .* at token \d+ of example \d"
    ):
        of.run()


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    model = module()
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[3, 5] = math.nan
    of = made(model, folder=tmp_path)
    with pytest.raises(TrainingError, match=r"the weight layers\.1\.mlp\.up_proj\.weight is not finite"):
        of.run()
    assert of.checkpoints.steps() == []


def test_an_op_between_modules_is_named_by_the_module_it_feeds(tmp_path):
    """A branch of infinite norm gives the attention NaN scores; its output projection is the first to be given them."""
    model = module()
    with torch.no_grad():
        model.layers[0].self_attn.q_norm.weight.fill_(3e38)
        model.layers[0].self_attn.k_norm.weight.fill_(3e38)
    of = made(model, folder=tmp_path)
    with pytest.raises(TrainingError, match=r"layers\.0\.self_attn\.\w+ \(\w+\) (makes|is given)"):
        of.run()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_some_steps_may_be_left_out(tmp_path, what):
    of = poisoned(tmp_path, what, at=2, times=2, step=Step(microbatch_tokens=24, skip_nonfinite=2))
    outcome = of.run()
    assert (outcome.step, outcome.stopped) == (STEPS, False)
    assert [e["step"] for e in of.log.entries if e.get("event") == "skipped"] == [3, 4]
    assert len(losses(tmp_path)) == STEPS - 2


def test_too_many_in_a_row_stop_it(tmp_path):
    of = poisoned(tmp_path, "loss", at=2, times=3, step=Step(microbatch_tokens=1000, skip_nonfinite=2))
    of.objective.length = -1
    of.objective.loss = lambda model, units: replace(NextToken().loss(model, units), total=torch.tensor(math.nan))
    with pytest.raises(TrainingError, match="step 3: the loss is nan"):
        of.run()
    assert of.step == 2


def test_weights_that_overflow_are_never_saved(tmp_path):
    of = made(folder=tmp_path, optimizer=replace(PLAIN, learning_rate=1e38), save=Save(every=1))
    with pytest.raises(TrainingError, match="not finite"):
        of.run()
    for step in of.checkpoints.steps():
        assert all(torch.isfinite(value).all() for value in of.checkpoints.load(step).weights.values())


def test_a_step_without_anything_to_learn_is_left_out():
    class Silent(Sequences):
        def at(self, position):
            units = super().at(position)
            return units if position != 1 else [(replace(u[0], weights=u[0].weights * 0),) for u in units]

    of = made(source=Silent())
    assert of.run().step == STEPS
    assert [e["why"] for e in of.log.entries if "why" in e] == ["nothing in it has a weight in the loss"]


# ── disks, logs, pictures ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_full_disk_does_not_end_the_run(tmp_path, monkeypatch):
    """The checkpoint of step 2 finds no room, that of step 3 does."""
    of = made(folder=tmp_path, save=Save(every=2, keep=9))
    real = of.checkpoints.save
    tries = []

    def save(saved):
        tries.append(saved.step)
        if saved.step == 2:
            raise NoSpaceError("no space in x: needs 1.2 GB, 0.3 GB free")
        return real(saved)

    monkeypatch.setattr(of.checkpoints, "save", save)
    of.run()
    assert tries == [2, 3, 4, 6]
    assert of.checkpoints.steps() == [3, 4, 6]
    (entry,) = [e for e in of.log.entries if e.get("event") == "not saved"]
    assert entry["why"] == "no space in x: needs 1.2 GB, 0.3 GB free"


def test_the_last_checkpoint_must_fit(tmp_path, monkeypatch):
    of = made(folder=tmp_path, steps=1)

    def save(_):
        raise NoSpaceError("no space")

    monkeypatch.setattr(of.checkpoints, "save", save)
    with pytest.raises(NoSpaceError):
        of.run()


def test_evaluation_changes_nothing_and_is_logged(tmp_path):
    plain, watched = made(with_dropout()), made(with_dropout(), monitor=Monitor(evaluate_every=2))
    watched.held_out = Sequences(seed=7).at(0)
    plain.run()
    outcome = watched.run()
    assert [e["step"] for e in watched.log.entries if "held_out" in e] == [0, 2, 4, 6]
    assert outcome.held_out == watched.log.entries[-1]["held_out"]
    assert set(outcome.held_out) == {"loss", "right"}
    assert all(torch.equal(a, b) for a, b in zip(weights(plain).values(), weights(watched).values(), strict=True))


def test_samples_are_logged():
    of = made(monitor=Monitor(sample_every=4))
    of.sample = lambda: [("Why?", f"at {of.step}")]
    of.run()
    shown = [(e["step"], e["samples"]) for e in of.log.entries if "samples" in e]
    assert shown == [(4, [{"prompt": "Why?", "text": "at 4"}]), (6, [{"prompt": "Why?", "text": "at 6"}])]


def test_progress_is_a_line():
    lines = []
    of = made(monitor=Monitor(log_every=3))
    of.on_step = lambda progress: lines.append(str(progress))
    of.run()
    assert len(lines) == 2
    assert lines[1].startswith("step 6/6 (100%)  loss ")
    assert all(part in lines[0] for part in ("lr 1.0e-03", " ms  ", " tok/s  peak ", "eta 0m0"))


def test_the_curve_is_drawn(tmp_path):
    of = made(folder=tmp_path, monitor=Monitor(evaluate_every=3))
    of.held_out = Sequences(seed=7).at(0)
    of.run()
    root = ET.parse(tmp_path / "curve.svg").getroot()
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"pretrain", "training", "held out", "loss", "learning rate", "steps"} <= set(texts)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_curve_is_missed_once(tmp_path, monkeypatch):
    def missing():
        raise MissingExtraError("drawing curves", "plot")

    monkeypatch.setattr(curves, "require", missing)
    said = []
    of = made(folder=tmp_path)
    of.say = said.append
    of.run()
    of.draw()
    assert [line for line in said if "curve" in line] == [said[-1]]
    assert "gemkit[plot]" in said[-1]
    assert not (tmp_path / "curve.svg").exists()


def test_long_curves_are_means():
    points = [(float(step), float(step % 2)) for step in range(1, 1001)]
    short = thinned(points)
    assert len(short) == 334
    assert short[0] == (3.0, pytest.approx(2 / 3))
    assert short[-1][0] == 1000.0
    assert thinned(points[:400]) == points[:400]


def test_global_settings_are_put_back():
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    made(steps=1, step=Step(microbatch_tokens=24, threads=1)).run()
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


def test_data_that_ends_is_said():
    class Short(Sequences):
        def __iter__(self):
            yield self.at(0)

    with pytest.raises(TrainingError, match="the data ended after 1 of 6 steps"):
        made(source=Short()).run()
