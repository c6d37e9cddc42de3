"""What is predicted of tensors without content against what real ones take."""

from dataclasses import replace

import pytest
import torch

from gemkit import family
from gemkit.adapters import lora
from gemkit.errors import ConfigError
from gemkit.nn import Batch
from gemkit.train.estimate import Plan, _Meter, choose, flops_per_second, predict
from gemkit.train.experiment import Data, LoRA, Model, Step
from gemkit.train.initialise import new_module
from gemkit.train.step import activation_checkpointing
from support.tiny import TOWER, VOCAB, tiny
from support.training import experiment, small

LENGTH = 96


def few(name):
    """A whole period of the layers of each member."""
    return small(name, 6)


def asked(**changes):
    changes.setdefault("data", Data(max_length=LENGTH, batch_size=4))
    return experiment(**{"step": Step(microbatch_tokens=2 * LENGTH), **changes})


def whole(module):
    module.requires_grad_(True)


def adapters(module):
    lora.enable_lora(module, 4)


def plan(name, prepare=whole, *, dtype=torch.float32, checkpointing=False, of=None) -> Plan:
    return predict(of or asked(), few(name), tower(name), prepare, dtype=dtype, checkpointing=checkpointing)


def tower(name):
    return replace(TOWER, placeholder=VOCAB - 2) if family.get(name).vision else None


def measured(name, prepare, *, checkpointing=False) -> tuple[int, int]:
    """Bytes of all tensors of a real step at their highest, and at the end of its forward; gradients of weights are
    left out."""
    module = new_module(few(name), tower(name))
    prepare(module)
    for parameter in filter(lambda p: p.requires_grad, module.parameters()):
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    pixels, rows, spans = None, [], []
    if module.vision is not None:
        pixels = torch.zeros(2, 3, module.vision.tower.image_size, module.vision.tower.image_size)
        patches = module.vision.tokens
        rows, spans = torch.arange(2 * patches), [(0, patches), (LENGTH, LENGTH + patches)]
    batch = Batch.of([torch.zeros(LENGTH, dtype=torch.int64)] * 2, spans=spans, image_rows=rows)
    with activation_checkpointing(module, checkpointing), _Meter() as meter:
        x_TD = module(batch, None, torch.arange(2 * LENGTH), pixels, output="hidden")
        kept = meter.now
        x_TD.backward(torch.zeros_like(x_TD))
    return meter.peak, kept


@pytest.mark.parametrize("prepare", [whole, adapters])
@pytest.mark.parametrize("name", ["gemma-2-2b", "gemma-3-270m", "recurrentgemma-2b", "paligemma-3b-pt-224"])
def test_activations_are_those_of_a_real_step(name, prepare):
    """Within 2 %: boundaries of a batch are tensors in one and numbers in the other."""
    peak, _ = measured(name, prepare)
    assert plan(name, prepare).activations == pytest.approx(peak, rel=0.02)


def test_many_sequences_are_as_many_times_one():
    """4 from 1 and 2, against 4 computed."""
    module = new_module(few("gemma-3-270m")).requires_grad_(True)
    batch = Batch.of([torch.zeros(LENGTH, dtype=torch.int64)] * 4)
    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with _Meter() as meter:
        x_TD = module(batch, None, torch.arange(4 * LENGTH), output="hidden")
        x_TD.backward(torch.zeros_like(x_TD))
    found = plan("gemma-3-270m", of=asked(step=Step(microbatch_tokens=4 * LENGTH)))
    assert found.tokens == 4 * LENGTH
    assert found.activations == pytest.approx(meter.peak, rel=0.02)


def test_blocks_computed_again_are_predicted_too():
    peak, _ = measured("gemma-3-270m", whole, checkpointing=True)
    again, plain = plan("gemma-3-270m", checkpointing=True), plan("gemma-3-270m")
    assert again.activations == pytest.approx(peak, rel=0.05)
    assert again.activations < plain.activations / 2.3
    assert again.flops > 1.2 * plain.flops


def test_counts_of_keras_rule():
    """The published ones of Gemma 2B at rank 4."""
    member = family.get("gemma-2b")
    of = asked(data=Data(max_length=2, batch_size=1))
    found = predict(of, member.decoder, None, lambda m: lora.enable_lora(m, 4, rule="keras"), dtype=torch.bfloat16)
    assert (found.parameters, found.trainable) == (2_506_172_416, 1_363_968)


def test_what_a_weight_costs():
    """float32: weight, gradient, two moments of 4 bytes. bfloat16: a weight of 2, and a master of 4 besides."""
    wide, narrow = plan("gemma-3-270m"), plan("gemma-3-270m", dtype=torch.bfloat16)
    n = wide.parameters
    assert wide.trainable == n
    assert (wide.weights, wide.gradients, wide.optimizer) == (4 * n, 4 * n, 8 * n)
    assert (narrow.weights, narrow.gradients, narrow.optimizer) == (2 * n, 4 * n, 12 * n)
    tuned = plan("gemma-3-270m", adapters, dtype=torch.bfloat16)
    assert tuned.weights == 2 * n + 4 * tuned.trainable  # adapters are float32
    assert tuned.optimizer == 8 * tuned.trainable


def test_operations_are_six_for_each_weight_and_token():
    """Two forward, four back; the head's among them. Attention over 64 tokens is 2 % of it. With adapters the four are
    two, and a little."""
    decoder = family.get("gemma-3-270m").decoder
    of = asked(data=Data(max_length=64, batch_size=4), step=Step(microbatch_tokens=64))
    matmuls = sum(s[0] * s[1] for _, s in family.parameters(decoder) if len(s) == 2)
    found, tuned = (predict(of, decoder, None, kind, dtype=torch.float32) for kind in (whole, adapters))
    assert found.flops / (6 * matmuls * 4 * 64) == pytest.approx(1.02, abs=0.02)
    assert tuned.flops / (4 * matmuls * 4 * 64) == pytest.approx(1.04, abs=0.03)


@pytest.mark.parametrize(
    ("needs", "of", "message"),
    [
        (
            lambda e, again: 50 if again else 200,
            asked(step=Step(activation_checkpointing="off")),
            r"step\.activation_checkpointing=on would fit",
        ),
        (
            lambda e, again: e.step.microbatch_tokens,
            asked(step=Step(microbatch_tokens=960)),
            r"step\.microbatch_tokens=96 would fit",
        ),
        (
            lambda e, again: 90 if e.lora.rank else 200,
            asked(step=Step(microbatch_tokens=96)),
            r"lora\.rank=8 would fit",
        ),
        (
            lambda e, again: 90 if e.model.weights else 200,
            asked(step=Step(microbatch_tokens=96), lora=LoRA(rank=4)),
            r"model\.weights=int4 would fit",
        ),
        (
            lambda e, again: 90 if e.model.weights and e.lora.rank else 200,
            asked(step=Step(microbatch_tokens=96), model=Model()),
            r"lora\.rank=8 and model\.weights=int4 would fit, in",
        ),
        (lambda e, again: 200, asked(), "not even .* would fit: take a smaller member"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_setting_that_would(needs, of, message):
    def plan_of(changed, again):
        return Plan(1, 1, needs(changed, again), 0, 0, 0, 0, 0, 1, 1, 1.0, again)

    with pytest.raises(ConfigError, match=message):
        choose(of, plan_of, 120, quantizes=True)
    assert choose(of, plan_of, None, quantizes=True).weights == plan_of(of, False).weights


def test_blocks_are_computed_again_by_themselves_where_memory_needs_it():
    def plan_of(_, again):
        return Plan(1, 1, 50 if again else 200, 0, 0, 0, 0, 0, 1, 1, 1.0, again)

    assert choose(asked(), plan_of, 100, quantizes=True).checkpointing
    assert not choose(asked(), plan_of, 1000, quantizes=True).checkpointing


def test_the_rate_of_a_machine_is_measured():
    assert 1e8 < flops_per_second(tiny("gemma-3-270m"), 64, torch.float32) < 1e15
