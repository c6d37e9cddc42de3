"""Quantizing: error bounds by mathematics, what calibration gains, and folders that are opened again, or refused."""

import json
import shutil
from dataclasses import replace

import pytest
import safetensors.torch
import torch

import gemkit
from gemkit.block_types import KINDS
from gemkit.errors import ConfigError, WeightsError
from gemkit.nn import Decoder
from gemkit.ops.quantized import Quantized
from gemkit.weights import quantize
from gemkit.weights.export.hf import save_hf
from gemkit.weights.formats.safetensors import SafetensorsReader
from gemkit.weights.quantize import INT4, INT5, INT8
from support.tiny import tiny
from support.tiny_models import edit_config, tokenizer, write

EVERY_KIND = pytest.mark.parametrize("kind", [INT8, INT5, INT4], ids=lambda kind: kind.name)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens, columns, seed=1):
    """Inputs that go together, as activations do: a few directions carry most of them."""
    few = drawn(tokens, 8, seed=seed) @ drawn(8, columns, seed=seed + 1)
    return few + 0.3 * drawn(tokens, columns, seed=seed + 2)


def scales_of(quantized):
    return quantized.planes["scales"].float().repeat_interleave(32, -1)


# ── each number by itself ───────────────────────────────────────────────────────────────────────────────────────────


def test_int8_is_off_by_half_a_scale_at_most():
    weight_OI = drawn(70, 640) * torch.logspace(-1, 2, 70)[:, None]  # scales that float16 has all its digits for
    found = quantize.nearest(weight_OI, INT8)
    # half a step, and what rounding the scale to float16 moves 127 steps by: 2^-11 of them
    assert ((found.dequantize() - weight_OI).abs() <= scales_of(found) * (0.5 + 127 * 2**-11) * 1.001).all()


@pytest.mark.parametrize("kind", [INT5, INT4], ids=lambda kind: kind.name)
def test_int4_and_int5_are_off_by_one_scale_at_most(kind):
    weight_OI = drawn(70, 640)
    found = quantize.nearest(weight_OI, kind)
    # codes end at 7 where the other end is -8: a number as large as the largest, of the other sign, is one step off;
    # float16 moves the scale by 2^-11 of it
    off, moved = (found.dequantize() - weight_OI).abs() / scales_of(found).abs(), kind.zero * 2**-11
    assert off.max() <= 1 + moved
    inside = weight_OI / scales_of(found) < kind.zero - 0.5 - moved
    assert off[inside].max() <= 0.5 + moved + 1e-4


@EVERY_KIND
def test_what_codes_can_say_comes_back(kind):
    codes = torch.randint(-7, 8, (6, 96), generator=torch.Generator().manual_seed(0)).float()
    codes[:, ::32] = -kind.zero or -127
    weight_OI = codes * 0.125
    assert torch.equal(quantize.nearest(weight_OI, kind).dequantize(), weight_OI)


@EVERY_KIND
def test_zeros_and_the_smallest_numbers(kind):
    """Below what a float16 scale can say all is 0, and nothing is infinite or not a number."""
    weight_OI = torch.zeros(3, 64)
    weight_OI[1] = 1e-12
    weight_OI[2, 5] = 1e-42
    assert torch.equal(quantize.nearest(weight_OI, kind).dequantize(), torch.zeros(3, 64))
    h_II = torch.eye(64)
    assert torch.equal(quantize.fitted(weight_OI, [h_II]).dequantize(), torch.zeros(3, 64))


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e8])
@EVERY_KIND
def test_what_cannot_be_quantized_is_named(kind, bad):
    weight_OI = drawn(4, 64)
    weight_OI[2, 40] = bad
    with pytest.raises(WeightsError, match=r"mlp\.up_proj cannot be quantized"):
        quantize.nearest(weight_OI, kind, "mlp.up_proj")
    with pytest.raises(WeightsError, match=r"mlp\.up_proj cannot be quantized"):
        quantize.fitted(weight_OI, [torch.eye(64)], name="mlp.up_proj")


def test_a_weight_larger_than_a_piece_is_quantized_whole(monkeypatch):
    weight_OI = drawn(50, 64)
    whole = quantize.nearest(weight_OI, INT8)
    off = quantize.rounding("x", weight_OI, whole)
    monkeypatch.setattr(quantize, "_PIECE", 64 * 7)
    pieces = quantize.nearest(weight_OI, INT8)
    assert torch.equal(pieces.dequantize(), whole.dequantize())
    assert quantize.rounding("x", weight_OI, pieces).error == pytest.approx(off.error, rel=1e-6)
    assert (off.nbytes_before, off.nbytes) == (50 * 64 * 4, 50 * 64 * 34 // 32)


# ── all of a matrix together ────────────────────────────────────────────────────────────────────────────────────────


def output_error(weight_OI, quantized, x_TI):
    return ((quantized.dequantize() - weight_OI) @ x_TI.T).square().sum().item()


@pytest.mark.parametrize("kind", [INT5, INT4], ids=lambda kind: kind.name)
def test_fitting_makes_outputs_better_than_rounding(kind):
    """On inputs that go together, and on others of their kind that were not shown."""
    weight_OI, shown, other = drawn(48, 256), correlated(600, 256), correlated(1200, 256)[600:]
    rounded = quantize.nearest(weight_OI, kind)
    fitted = quantize.fitted(weight_OI, quantize.second_moments(shown), kind)
    assert output_error(weight_OI, fitted, shown) < 0.5 * output_error(weight_OI, rounded, shown)
    assert output_error(weight_OI, fitted, other) < 0.6 * output_error(weight_OI, rounded, other)


def test_sweeps_only_make_it_better(monkeypatch):
    weight_OI, x_TI = drawn(48, 256), correlated(600, 256)
    moments = quantize.second_moments(x_TI)
    losses = []
    for sweeps in range(4):
        monkeypatch.setattr(quantize, "_SWEEPS", sweeps)
        off = quantize.fitted(weight_OI, moments).dequantize() - weight_OI
        losses.append(((off @ moments[0]) * off).sum().item())
    assert losses == sorted(losses, reverse=True)
    assert losses[2] < 0.95 * losses[0]


def test_where_inputs_are_independent_nothing_is_carried():
    """H = 1: each group for itself, and no scale of it is worse than the one that plain rounding takes."""
    weight_OI = drawn(64, 96)
    identity = torch.eye(96)
    rounded, fitted = quantize.nearest(weight_OI, INT4), quantize.fitted(weight_OI, [identity])
    off = [(found.dequantize() - weight_OI).unflatten(1, (-1, 32)).square().sum(-1) for found in (rounded, fitted)]
    assert (off[1] <= off[0] * (1 + 1e-5)).all()
    # a group can be fitted without the others
    alone = quantize.fitted(weight_OI[:, 32:64], [identity[:32, :32]])
    assert torch.equal(alone.dequantize(), fitted.dequantize()[:, 32:64])


def test_where_a_norm_follows_no_token_decides_alone():
    """Tokens count by the inverse square of their outputs: those of one a thousand times as large are another's."""
    x_TI = correlated(100, 64)
    y_TO = x_TI @ drawn(48, 64).T
    sizes = torch.logspace(0, 3, 100)[:, None]
    plain, scaled = quantize.second_moments(x_TI, y_TO), quantize.second_moments(x_TI * sizes, y_TO * sizes)
    assert torch.allclose(plain[0], scaled[0], rtol=1e-4, atol=1e-4 * plain[0].max().item())


def test_the_factor_is_the_one_that_is_meant():
    h_II = quantize.second_moments(correlated(100, 64))[0]
    u_II, d_I = quantize._factor(h_II)
    assert torch.equal(u_II.triu(), u_II)
    assert torch.equal(u_II.diagonal(), torch.ones(64))
    assert (u_II * d_I @ u_II.T - h_II).abs().max() <= 1e-5 * h_II.abs().max()  # float32


def test_wide_matrices_are_fitted_run_by_run(monkeypatch):
    weight_OI, x_TI = drawn(8, 192), correlated(300, 192)
    monkeypatch.setattr(quantize, "_RUN", 128)
    moments = quantize.second_moments(x_TI)
    assert [len(h_II) for h_II in moments] == [128, 64]
    found = quantize.fitted(weight_OI, moments).dequantize()
    parts = [quantize.fitted(weight_OI[:, a:b], [h]) for a, b, h in ((0, 128, moments[0]), (128, 192, moments[1]))]
    assert torch.equal(found, torch.cat([part.dequantize() for part in parts], 1))


def test_inputs_that_say_nothing_or_too_much():
    weight_OI = drawn(8, 64)
    silent = quantize.second_moments(torch.zeros(5, 64))  # as good as independent ones
    assert torch.equal(
        quantize.fitted(weight_OI, silent).dequantize(), quantize.fitted(weight_OI, [torch.eye(64)]).dequantize()
    )
    with pytest.raises(WeightsError, match="activations of the calibration text are not finite"):
        quantize.second_moments(torch.full((2, 64), float("inf")))


# ── whole models ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("gemma")
    write(path, "gemma-2-2b")
    return path


TEXT = "the quick brown fox jumps over the lazy dog. " * 20


@pytest.mark.parametrize("name", ["gemma-2b", "gemma-2-2b", "gemma-3-1b", "recurrentgemma-2b"])
def test_which_weights_become_what(name):
    config = tiny(name)
    with torch.device("meta"):
        module = Decoder(config if config.width % 32 == 0 else replace(config, width=64))
    for parameter in dict(module.named_parameters()):
        if parameter == "lm_head.weight":
            continue
        kinds = {weights: quantize.kind_of(module, parameter, weights) for weights in ("int8", "int4")}
        matrix = parameter.endswith(("_proj.weight", "linear_x.weight", "linear_y.weight", "linear_out.weight"))
        if parameter == "embed_tokens.weight" or parameter.endswith(("k_proj.weight", "v_proj.weight")):
            assert kinds == {"int8": INT8, "int4": INT8}
        elif parameter.endswith(("up_proj.weight", "down_proj.weight")):
            assert kinds == {"int8": INT8, "int4": INT5}
        elif matrix:
            assert kinds == {"int8": INT8, "int4": INT4}
        else:  # norms, biases, the convolution, the gates
            assert kinds == {"int8": None, "int4": None}, parameter


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_saved_model_is_the_same_bit_for_bit(folder, tmp_path, weights):
    model = gemkit.load(folder, weights=weights, calibrate=TEXT, executor="torch")
    again = gemkit.load(model.save(tmp_path / "saved", quantized=True), executor="torch")
    held = 0
    for part, _ in gemkit.family.parameters(model.config):
        ours, theirs = model.module.get_param(part), again.module.get_param(part)
        if isinstance(ours, Quantized):
            held += 1
            assert ours.kind is theirs.kind
            assert all(torch.equal(ours.planes[plane], theirs.planes[plane]) for plane in ours.planes)
        else:
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
    assert held == 1 + 7 * 26
    assert len(model.report.roundings) == held
    assert again.report.nbytes == model.report.nbytes == again.report.nbytes_read
    assert again.score("abc").total == model.score("abc").total
    assert again.module.lm_head.weight is again.module.embed_tokens.weight


def test_a_calibrated_model_is_nearer_to_the_original(folder):
    text = "pack my box with five dozen liquor jugs, and judge my vow. " * 3
    ids = torch.tensor([gemkit.load(folder, executor="torch").tokenizer.encode(text)])

    def logits(**options):
        return gemkit.load(folder, **options, executor="torch").module(ids)

    original = logits()
    off = {c: (logits(weights="int4", calibrate=c) - original).square().mean() for c in (TEXT, False)}
    assert off[TEXT] < 0.95 * off[False]  # found: 0.86; inputs of random weights hardly go together
    # codes are 16 times as fine, though not those of the table, the keys and the values, which are int8 in both
    assert (logits(weights="int8") - original).square().mean() < 0.1 * off[False]


def test_what_is_small_already_stays(folder, tmp_path):
    saved = gemkit.load(folder, weights="int4", calibrate=False, executor="torch").save(
        tmp_path / "int4", quantized=True
    )
    model = gemkit.load(saved, weights="int8", executor="torch")
    assert not model.report.roundings
    assert any("182 weights were" not in note and "stay as they are" in note for note in model.report.notes)
    again = gemkit.load(saved, weights="int8", quantized=False, executor="torch")
    assert len(again.report.roundings) == 1 + 7 * 26


def test_rows_that_do_not_divide_stay_dense(tmp_path):
    config = gemkit.family.replace_layers(tiny("gemma-2b"), ffw={"width": 80})
    config = replace(config, vocab_size=len(tokenizer()))
    with torch.device("meta"):
        module = Decoder(config)
    for name, shape in gemkit.family.parameters(config):
        module.set_param(name, torch.nn.Parameter(drawn(*shape), requires_grad=False))
    save_hf(module, tmp_path / "odd", tokenizer=tokenizer())
    model = gemkit.load(tmp_path / "odd", weights="int8", executor="torch")
    assert any("18 matrices stay dense: their rows do not divide into 32" in note for note in model.report.notes)
    assert isinstance(model.module.get_param("layers.0.mlp.down_proj.weight"), torch.Tensor)
    assert model.module.get_param("layers.0.mlp.up_proj.weight").kind is INT8


def test_options_that_mean_nothing_are_refused(folder):
    with pytest.raises(ConfigError, match="weights='int2' is not one of int8, int4"):
        gemkit.load(folder, weights="int2", executor="torch")
    with pytest.raises(ConfigError, match="calibration text is empty"):
        gemkit.load(folder, weights="int4", calibrate="", executor="torch")


# ── hostile folders ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("quantized") / "int4"
    return gemkit.load(folder, weights="int4", calibrate=False, executor="torch").save(path, quantized=True)


@pytest.fixture
def broken(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "broken")


GATE, KEY = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.self_attn.k_proj.weight"


def settings(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({GATE: "Q4_9"}, "is said to be 'Q4_9', which is not one of Q4_0"),
        ({GATE: ["Q4_0"]}, "which is not one of"),
        ({GATE: "Q8_0"}, "is Q8_0, but its rows of 16 are not a multiple of 32"),
        ({GATE: "Q4_1"}, f"no tensor '{GATE}.mins'"),
        ({KEY: "Q4_0"}, "plane codes is .* I8, must be"),
        ({"model.norm.weight": "Q4_0"}, "is also stored as it is"),
        ({"model.nothing": "Q4_0"}, "no tensor 'model.nothing.codes'"),
    ],
)
def test_kinds_that_the_planes_are_not(broken, change, message):
    found = settings(broken)
    edit_config(broken, quantization_config={**found, "kinds": {**found["kinds"], **change}})
    with pytest.raises(WeightsError, match=message):
        gemkit.load(broken, executor="torch")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quantized by 'bitsandbytes', which is not read"),
        ("gemkit", "quantized by None"),
        ({"quant_method": "gemkit"}, "has no kinds"),
        ({"quant_method": "gemkit", "kinds": {}}, "601 tensors do not fit"),
    ],
)
def test_a_configuration_of_something_else(broken, value, message):
    edit_config(broken, quantization_config=value)
    with pytest.raises(WeightsError, match=message):
        gemkit.load(broken, executor="torch")


@pytest.mark.parametrize(
    ("plane", "change", "message"),
    [
        ("codes", lambda x: None, "no tensor"),
        ("codes", lambda x: x[:-1].clone(), "is \\(95, 64\\) in the file|plane scales"),
        ("codes", lambda x: x[:, :-1].clone(), "not a multiple of 32"),
        ("codes", lambda x: x.flatten(), "not that of a matrix"),
        ("scales", lambda x: x.float(), "plane scales is .* F32, must be .* F16 for Q4_0"),
        ("scales", lambda x: x.T.contiguous(), "plane scales is"),
    ],
)
def test_planes_that_do_not_fit(broken, plane, change, message):
    path = broken / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    value = change(tensors.pop(f"{GATE}.{plane}"))
    if value is not None:
        tensors[f"{GATE}.{plane}"] = value
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(WeightsError, match=message):
        gemkit.load(broken, executor="torch")


@pytest.mark.parametrize("name", KINDS)
def test_planes_are_known_without_torch(name, tmp_path):
    """The reader joins what the kinds lay out, of every one of them."""
    layout = KINDS[name].layout(3, 512)
    planes = {plane: torch.randint(0, 99, shape).to(getattr(torch, dtype)) for plane, (shape, dtype) in layout.items()}
    safetensors.torch.save_file({f"x.{plane}": value for plane, value in planes.items()}, tmp_path / "x.safetensors")
    with SafetensorsReader(tmp_path / "x.safetensors") as reader:
        reader.join({"x": name})
        assert list(reader.entries) == ["x"]
        assert (reader.entries["x"].shape, reader.entries["x"].dtype) == ((3, 512), name)
        found = reader.read("x")
        assert all(torch.equal(found.planes[plane], planes[plane]) for plane in planes)
