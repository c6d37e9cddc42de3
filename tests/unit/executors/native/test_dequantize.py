"""`gemkit::dequantize` by the library: bit for bit its definition, and only where it may be."""

import pytest
import torch

from gemkit.block_types import KINDS
from gemkit.executors.native import dequantize
from gemkit.ops.quantized import Quantized


def weight(name: str, rows: int = 37, columns: int = 512) -> Quantized:
    generator = torch.Generator().manual_seed(0)
    planes = {}
    for plane, (shape, dtype) in KINDS[name].layout(rows, columns).items():
        if dtype == "float16":
            planes[plane] = torch.randn(shape, generator=generator).half()
        else:
            planes[plane] = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).view(
                getattr(torch, dtype)
            )
    return Quantized(KINDS[name], planes, (rows, columns))


@pytest.fixture
def calls(monkeypatch):
    """How often the library was asked."""
    found, dense = [], dequantize._dense
    monkeypatch.setattr(dequantize, "_dense", lambda *args: found.append(1) or dense(*args))
    return found


@pytest.mark.parametrize("name", KINDS)
def test_the_bits_are_those_of_the_definition(name, calls):
    with dequantize.enabled(False):
        defined = weight(name).dequantize()
    assert not calls
    with dequantize.enabled(True):
        assert torch.equal(weight(name).dequantize(), defined)
    assert calls


def test_what_is_not_contiguous_is_left_to_the_definition(calls):
    with dequantize.enabled(True):
        out = torch.empty(37, 1024)[:, ::2]
        assert torch.equal(weight("Q4_K").dequantize(out=out), weight("Q4_K").dequantize())
    assert len(calls) == 1


def test_a_compiled_model_sees_one_operator():
    """The fake tensor of the operator: traced without a byte of the weight."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        assert weight("Q6_K").dequantize().shape == (37, 512)
