"""AdamW against torch's own on float32, and what bfloat16 weights would lose without masters."""

import math

import pytest
import torch
from torch.nn import Parameter

from gemkit import family
from gemkit.errors import ConfigError, TrainingError
from gemkit.train import experiment
from gemkit.train.optimizer import Optimizer, decays, learning_rate
from support.training import PLAIN, replace


def settings(**changes) -> experiment.Optimizer:
    return replace(PLAIN, **changes)


def weights(dtype=torch.float32) -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"layers.0.mlp.up_proj.weight": (5, 7), "norm.weight": (7,), "layers.0.mlp.up_proj.bias": (5,)}
    return {n: Parameter(torch.randn(s, generator=generator).to(dtype)) for n, s in shapes.items()}


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(w.shape, generator=generator) for w in weights().values()]


def test_steps_are_those_of_plain_adamw_with_decay_on_matrices_alone():
    ours, theirs = weights(), weights()
    optimizer = Optimizer(ours, settings(grad_clip=0.0), 5)
    matrix, *others = theirs.values()
    plain = torch.optim.AdamW(
        [{"params": [matrix], "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=1e-3, foreach=False
    )
    for step in range(5):
        for kind in (ours, theirs):
            for weight, grad in zip(kind.values(), gradients(step), strict=True):
                weight.grad = grad.clone()
        optimizer.step(step, optimizer.grad_norm())
        plain.step()
        plain.zero_grad()
    for name in ours:  # rounding of a fused kernel
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=0)
        assert ours[name].grad is None


def test_clipping_is_torchs():
    ours, theirs = weights(), weights()
    optimizer = Optimizer(ours, settings(grad_clip=0.5), 1)
    for kind in (ours, theirs):
        for weight, grad in zip(kind.values(), gradients(0), strict=True):
            weight.grad = grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 0.5)
    assert optimizer.grad_norm() == pytest.approx(norm.item(), rel=1e-6)
    clipped = {}
    optimizer._adamw.step = lambda: clipped.update({n: g.clone() for n, g in optimizer.gradients().items()})
    optimizer.step(0, optimizer.grad_norm())
    for name, weight in theirs.items():  # torch divides by the norm + 1e-6
        torch.testing.assert_close(clipped[name], weight.grad, atol=2e-6, rtol=2e-6)


def test_bfloat16_weights_keep_changes_that_are_smaller_than_their_rounding():
    """200 steps of 1e-4 each move a weight of 1 by 0.02; in bfloat16 alone every one of them would be lost."""
    ours = {"w.weight": Parameter(torch.ones(4, 4, dtype=torch.bfloat16))}
    optimizer = Optimizer(ours, settings(learning_rate=1e-4, weight_decay=0.0), 200)
    for step in range(200):
        ours["w.weight"].backward(torch.ones(4, 4, dtype=torch.bfloat16))
        optimizer.step(step, optimizer.grad_norm())
    master = optimizer.masters["w.weight"]
    assert master.dtype == torch.float32
    torch.testing.assert_close(master, torch.full((4, 4), 0.98), atol=1e-5, rtol=0)
    assert torch.equal(ours["w.weight"], master.bfloat16())


def test_gradients_of_parts_are_added_in_float32():
    """256 parts of 1 and one of 256: in bfloat16 the sum would stop at 256."""
    ours = {"w.weight": Parameter(torch.zeros(2, dtype=torch.bfloat16))}
    optimizer = Optimizer(ours, settings(), 1)
    for value in [256.0] + [1.0] * 256:
        ours["w.weight"].backward(torch.full((2,), value, dtype=torch.bfloat16))
    assert optimizer.gradients()["w.weight"].tolist() == [512.0, 512.0]
    assert ours["w.weight"].grad is None


@pytest.mark.parametrize("name", ["gemma-3-270m", "recurrentgemma-2b", "paligemma-3b-pt-224"])
def test_what_decays(name):
    """Every matrix of every projection, the convolution and the patches; nothing else."""
    member = family.get(name)
    matrices = ("proj.weight", "linear_x.weight", "linear_y.weight", "linear_out.weight", "conv_1d.weight")
    tower = ("patch_embedding.weight", "fc1.weight", "fc2.weight", "linear.weight")
    for weight, _ in family.parameters(member.decoder, member.vision):
        expected = weight.endswith(matrices + tower) and "embed" not in weight
        assert decays(weight) is expected, weight
    assert decays("layers.0.mlp.up_proj.adapters.default.lora_A.weight")


def test_schedules():
    """Rates of 10 steps with 2 of warm-up."""

    def rates(**changes):
        of = settings(**{"learning_rate": 1.0, "warmup": 2, **changes})
        return [learning_rate(of, step, 10) for step in range(10)]

    assert rates(decay="constant") == [0.5, *[1.0] * 9]
    linear = rates(decay="linear", final_lr_share=0.1)
    assert linear[:2] == [0.5, 1.0]
    assert linear[-1] == pytest.approx(0.1)
    assert linear[5] == pytest.approx(1 - 0.9 * 4 / 8)
    cosine = rates(decay="cosine")
    assert cosine[1] == 1.0
    assert cosine[-1] == pytest.approx(0.0)
    assert cosine[5] == pytest.approx((1 + math.cos(math.pi / 2)) / 2)
    rsqrt = rates(decay="rsqrt")
    assert rsqrt[1] == 1.0
    assert rsqrt[7] == pytest.approx(math.sqrt(2 / 8))
    assert rates(decay="constant", warmup=0.2) == rates(decay="constant", warmup=2)


def test_a_state_goes_on_to_the_same_bits():
    def run(optimizer, ours, steps):
        for step in steps:
            for weight, grad in zip(ours.values(), gradients(step), strict=True):
                weight.backward(grad.to(weight.dtype))
            optimizer.step(step, optimizer.grad_norm())

    whole, first = weights(torch.bfloat16), weights(torch.bfloat16)
    run(Optimizer(whole, settings(), 6), whole, range(6))
    before = Optimizer(first, settings(), 6)
    run(before, first, range(3))
    state = {name: value.clone() for name, value in before.state_dict().items()}
    second = {name: Parameter(value.detach().clone()) for name, value in first.items()}
    after = Optimizer(second, settings(), 6)
    after.resume(state)
    run(after, second, range(3, 6))
    assert all(torch.equal(whole[name], second[name]) for name in whole)


def test_a_state_of_something_else_is_refused():
    optimizer = Optimizer(weights(), settings(), 1)
    with pytest.raises(TrainingError, match=r"exp_avg\.other\.weight, which is nothing that is trained here"):
        optimizer.resume({"exp_avg.other.weight": torch.zeros(2)})
    with pytest.raises(TrainingError, match=r"norm\.weight is \(7,\) here, and \(3,\)"):
        optimizer.resume({"exp_avg.norm.weight": torch.zeros(3), "step.norm.weight": torch.tensor(1.0)})
    with pytest.raises(ConfigError, match="every weight is frozen"):
        Optimizer({}, settings(), 1)
