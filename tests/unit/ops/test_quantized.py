"""The planar layout against its own definition, written out element by element."""

import numpy as np
import pytest
import torch

from gemkit import ops
from gemkit.block_types import KINDS, PLANES
from gemkit.errors import WeightsError
from gemkit.ops.quantized import _CHUNK, Quantized

pytestmark = pytest.mark.usefixtures("made_dense")
EVERY_KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def random_weight(kind, rows, columns, seed=0):
    rng = np.random.default_rng(seed)
    planes = {}
    for name, (shape, dtype) in kind.layout(rows, columns).items():
        if dtype == "float16":
            planes[name] = torch.from_numpy(rng.standard_normal(shape).astype(np.float16))
        else:
            planes[name] = torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8)).view(getattr(torch, dtype))
    return Quantized(kind, planes, (rows, columns))


def defined_value(weight, row, column):
    """The module's docstring, for one element."""
    kind = weight.kind
    planes = {name: plane[row].numpy() for name, plane in weight.planes.items()}
    code, low = 0, 0
    run, e = divmod(column, 32)
    for name, bits in zip(("codes", "high"), kind.bits, strict=False):
        if bits == 8:
            code = int(planes[name][column])
            continue
        n = 4 * bits
        code += (int(planes[name][run * n + e % n]) >> (bits * (e // n)) & (1 << bits) - 1) << low
        low += bits

    def of_group(name):
        value = np.float32(planes[name][column // kind.group])
        return np.float32(planes["super_" + name][column // kind.superblock]) * value if kind.superblock else value

    number = code - kind.zero if kind.values is None else kind.values[code]
    value = of_group("scales") * np.float32(kind.unit) * np.float32(number)
    return value - of_group("mins") if kind.minima else value


@EVERY_KIND
def test_dequantize_is_the_definition(kind):
    weight = random_weight(kind, 2, 512)
    wanted = [[defined_value(weight, row, column) for column in range(512)] for row in range(2)]
    assert torch.equal(weight.dequantize(), torch.from_numpy(np.array(wanted, np.float32)))


@EVERY_KIND
def test_rows_and_slices_are_those_of_the_whole(kind):
    weight = random_weight(kind, 7, 256)
    whole = weight.dequantize()
    assert torch.equal(weight.narrow_rows(2, 4).dequantize(), whole[2:6])
    index = torch.tensor([[6, 0, 0], [3, 5, 1]])
    assert torch.equal(weight.rows(index), whole[index])
    assert weight.rows(torch.empty(0, dtype=torch.int64)).shape == (0, 256)
    assert torch.equal(weight.dequantize(torch.bfloat16), whole.bfloat16())
    assert torch.equal(weight.rows(index, torch.bfloat16), whole[index].bfloat16())


def test_narrow_rows_shares_memory():
    weight = random_weight(KINDS["Q5_1"], 8, 64)
    part = weight.narrow_rows(3, 2)
    for name, plane in part.planes.items():
        assert plane.data_ptr() == weight.planes[name][3].data_ptr()


def test_a_weight_larger_than_a_chunk_is_dequantized_whole():
    columns = 4096
    rows = 2 * _CHUNK // columns + 3
    weight = random_weight(KINDS["Q4_0"], rows, columns)
    whole = weight.dequantize(torch.bfloat16)
    for row in (0, _CHUNK // columns - 1, _CHUNK // columns, rows - 1):  # both sides of the seam, and the odd end
        assert torch.equal(whole[row], weight.rows(torch.tensor(row)).bfloat16())


def test_it_is_written_where_it_is_wanted():
    weight = random_weight(KINDS["Q6_K"], 5, 512)
    for out in (torch.empty(7, 512)[:5], torch.empty(5, 1024)[:, :512], torch.empty(5, 512, dtype=torch.bfloat16)):
        assert weight.dequantize(out.dtype, out=out) is out
        assert torch.equal(out, weight.dequantize(out.dtype))


def test_planes_that_do_not_lie_row_by_row():
    weight = random_weight(KINDS["Q4_1"], 6, 64)
    apart = {name: torch.cat([plane, plane], 1)[:, : plane.shape[1]] for name, plane in weight.planes.items()}
    assert torch.equal(Quantized(weight.kind, apart, weight.shape).dequantize(), weight.dequantize())


def test_to_moves_every_plane():
    weight = random_weight(KINDS["Q4_K"], 2, 256).to("meta")
    assert weight.device.type == "meta"
    assert {plane.device.type for plane in weight.planes.values()} == {"meta"}


# bits a weight of the published block types: bytes of a block * 8 / its elements. Q3_K alone is stored wider here: its
# 6-bit scales take a byte each, and so do those of the other K types (4.5 + 8*4/256 for the 16 of Q4_K's scales, ...).
@pytest.mark.parametrize(("name", "bits"), [("Q4_0", 4.5), ("Q4_1", 5), ("Q5_0", 5.5), ("Q5_1", 6), ("Q8_0", 8.5)])
def test_nbytes_of_flat_kinds_is_that_of_the_file(name, bits):
    assert random_weight(KINDS[name], 16, 256).nbytes == 16 * 256 * bits / 8


@pytest.mark.parametrize(("name", "spread"), [("Q2_K", 16), ("Q3_K", 4), ("Q4_K", 4), ("Q5_K", 4), ("Q6_K", 0)])
def test_nbytes_of_k_kinds_grows_by_what_unpacking_their_scales_takes(name, spread):
    in_file = {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210}[name]
    assert random_weight(KINDS[name], 3, 512).nbytes == 3 * 2 * (in_file + spread)


def test_says_what_it_is():
    assert repr(random_weight(KINDS["Q6_K"], 3, 512)) == "Quantized(Q6_K, shape=(3, 512))"


def test_refuses_planes_of_another_shape_or_dtype():
    planes = dict(random_weight(KINDS["Q5_0"], 4, 64).planes)
    with pytest.raises(WeightsError, match=r"plane high is missing, must be \(4, 8\)"):
        Quantized(KINDS["Q5_0"], {name: plane for name, plane in planes.items() if name != "high"}, (4, 64))
    with pytest.raises(WeightsError, match=r"plane codes is \(4, 32\) torch.uint8, must be \(5, 32\)"):
        Quantized(KINDS["Q5_0"], planes, (5, 64))
    with pytest.raises(WeightsError, match=r"plane scales is \(4, 2\) torch.float32, must be \(4, 2\) torch.float16"):
        Quantized(KINDS["Q5_0"], planes | {"scales": planes["scales"].float()}, (4, 64))


def test_refuses_rows_that_do_not_divide_into_blocks():
    with pytest.raises(WeightsError, match="Q4_K: rows of 640 are not a multiple of 256"):
        KINDS["Q4_K"].layout(1, 640)


# ── multiplied by ───────────────────────────────────────────────────────────────────────────────────────────────────


def product(weight, dtype=torch.float32, tokens=3):
    """A product with a gradient of x; the same with the weight made dense."""
    generator = torch.Generator().manual_seed(4)
    x_TI = torch.randn(tokens, weight.shape[1], generator=generator).to(dtype)
    bias_O = torch.randn(weight.shape[0], generator=generator).to(dtype)
    upstream_TO = torch.randn(tokens, weight.shape[0], generator=generator).to(dtype)
    results = []
    for given in (weight, weight.dequantize()):
        x, bias = x_TI.clone().requires_grad_(), bias_O.clone().requires_grad_()
        y = ops.linear(x, given, bias)
        y.backward(upstream_TO)
        results.append((y.detach(), x.grad, bias.grad))
    return results


@EVERY_KIND
def test_the_gradient_of_a_product_is_that_of_the_dense_weight(kind):
    for got, expected in zip(*product(random_weight(kind, 40, 512)), strict=True):
        # float32 sums of up to 512 terms in another order, relative to the largest
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 700])
def test_the_gradient_is_the_same_on_both_sides_of_a_piece(rows, monkeypatch):
    monkeypatch.setattr("gemkit.ops.basic._DENSE_ELEMENTS", 256 * 64)
    for got, expected in zip(*product(random_weight(KINDS["Q4_0"], rows, 64)), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_in_bfloat16_gradients_have_the_dtype_of_x():
    (_, grad, _), (_, expected, _) = product(random_weight(KINDS["Q8_0"], 40, 64), torch.bfloat16)
    assert grad.dtype == torch.bfloat16
    # both sum in float32 and round once: numbers between two of bf16's may go either way
    torch.testing.assert_close(grad, expected, rtol=2**-6, atol=2**-7 * expected.abs().max().item())


def test_nothing_dense_is_kept_between_the_passes():
    weight = random_weight(KINDS["Q4_0"], 300, 64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)), lambda _: None):
        x = torch.randn(5, 64, requires_grad=True)
        y = ops.linear(x, weight)
        assert y.requires_grad
        rows = ops.embed(torch.tensor([1, 2]), weight, 8.0)
    assert kept == []
    assert not rows.requires_grad  # a table that nothing can change has no gradient


def test_a_weight_of_another_dtype_is_multiplied_in_its_own():
    """An adapter's, which stays float32 beside a model in bfloat16."""
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    got = ops.linear(x, weight)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, (x.float() @ weight.T).bfloat16())


@pytest.mark.parametrize("name", ["Q5_1", "Q8_0", "Q3_K"])
def test_dequantize_is_an_operator_of_torch(name):
    """Its schema, fake tensor and functionalisation, as torch checks them, with and without the optional planes."""
    weight = random_weight(KINDS[name], 3, 512)
    planes = [weight.planes.get(plane) for plane in PLANES]
    torch.library.opcheck(torch.ops.gemkit.dequantize.default, (*planes, name, torch.empty(3, 512)))
