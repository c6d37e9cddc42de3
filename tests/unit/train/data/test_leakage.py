"""No example sees another: logits and gradients of examples laid end to end are those of each alone."""

import numpy as np
import pytest
import torch

from gemkit import nn
from gemkit.nn import Batch
from gemkit.train.batching import Example, PackedBatch
from support.tiny import VOCAB, WINDOW, tiny

LENGTHS = (3 * WINDOW, 5, 2, 2 * WINDOW + 1)  # past the window, shorter than the convolution, and in between


@pytest.fixture(scope="module", params=["gemma-2-2b", "recurrentgemma-2b", "gemma-3-1b"])
def model(request):
    config = tiny(request.param)
    assert config.windows or config.recurrent
    module = nn.Decoder(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            weight.normal_(0, 0.3 if "norm" in name else 0.15, generator=generator)
    return module.double()


def examples(seed=1):
    rng = np.random.default_rng(seed)
    return [
        Example(rng.integers(0, VOCAB, length), np.append(0, [*rng.integers(0, 2, length - 2), 1]).astype(np.float32))
        for length in LENGTHS
    ]


def logits(model, some):
    rows = PackedBatch.of(some)
    return rows, model.decoder.lm_head(rows.hidden(model))


def cross_entropy(logits, targets):
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


def test_logits_and_losses_are_those_of_each_alone(model):
    together, apart = examples(), examples()
    rows, packed = logits(model, together)
    for i, example in enumerate(apart):
        alone, expected = logits(model, [example])
        mine = rows.sequences == i
        # float64, in sums of another order
        torch.testing.assert_close(packed[mine], expected, rtol=0, atol=1e-10)
        assert torch.equal(rows.targets[mine], alone.targets)
        loss, theirs = (cross_entropy(values, alone.targets) for values in (packed[mine], expected))
        assert loss.item() == pytest.approx(theirs.item(), abs=1e-9)


def test_an_example_has_no_gradient_from_another(model):
    """The loss of one example does not change with the tokens of those before and after it, nor does its gradient."""
    _, packed = logits(model, examples())
    first, second, third, fourth = examples()
    other = Example((first.ids + 7) % VOCAB, first.weights)
    rows, changed = logits(model, [other, second, third, fourth])
    mine = rows.sequences > 0
    assert torch.equal(packed[mine], changed[mine])
    grads = []
    for some in ([second], [first, second, fourth]):
        rows, values = logits(model, some)
        mine = rows.sequences == (len(some) > 1)
        cross_entropy(values[mine], rows.targets[mine]).backward()
        grads.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
        model.zero_grad()
    largest = max(grad.abs().max().item() for grad in grads[0].values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=0, atol=1e-11 * largest)


def test_a_batch_without_boundaries_would_differ(model):
    """What the tests above would find: the same tokens as one sequence give other logits."""
    some = examples()
    one = Batch.of([torch.from_numpy(np.concatenate([example.ids for example in some]))])
    apart = Batch.of([torch.from_numpy(example.ids) for example in some])
    with torch.no_grad():
        joined, right = model(one), model(apart)
    start = LENGTHS[0]
    assert (joined[:start] - right[:start]).abs().max() < 1e-10
    assert (joined[start : start + 5] - right[start : start + 5]).abs().max() > 1e-3
