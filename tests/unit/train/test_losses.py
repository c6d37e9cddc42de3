"""Losses by chunks against the same written plainly, on all logits at once and differentiated by torch, in float64."""

import importlib
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import ModuleDict, Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gemkit import nn
from gemkit.adapters.layers import LoRA
from gemkit.block_types import KINDS
from gemkit.errors import ConfigError
from gemkit.ops.quantized import Quantized
from gemkit.train import losses
from support.tiny import tiny

chunked = importlib.import_module("gemkit.ops.linear_cross_entropy")  # the function hides its module

ROWS, VOCAB = 13, 320
HEADS = ("plain", "capped", "hooked", "adapted", "biased")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 4 rows, slabs of 3 and blocks of 100, none of which divides what it cuts."""
    monkeypatch.setattr(chunked, "CHUNK", 4 * VOCAB)
    monkeypatch.setattr(chunked, "_SLAB", 3 * VOCAB)
    monkeypatch.setattr(chunked, "_BLOCK", 100)


def model_with(head: str, dtype=torch.float64, seed: int = 0) -> nn.Decoder:
    """A decoder of one layer with a random table; `head` says what is on its head."""
    config = tiny("gemma-2-2b")
    config = replace(config, layers=config.layers[:1], final_softcap=None if head == "plain" else 2.0)
    model = nn.Decoder(config)
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    model.decoder.embed_tokens.weight.data = noise(VOCAB, config.width)
    if head == "hooked":
        model.decoder.lm_head.register_forward_hook(lambda _module, _args, logits: 1.5 * logits)  # type: ignore[operator]
    if head == "adapted":
        adapter = LoRA(config.width, VOCAB, 3, 0.5)
        adapter.lora_A.weight.data, adapter.lora_B.weight.data = noise(3, config.width), noise(VOCAB, 3)
        model.decoder.lm_head.adapters = ModuleDict({"default": adapter})
    if head == "biased":
        model.decoder.lm_head.bias = Parameter(noise(VOCAB))
    return model.to(dtype)


def rows_of(model: nn.Decoder, seed: int = 1, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden rows, targets and weights."""
    generator = torch.Generator().manual_seed(seed)
    x_MD = torch.randn(rows, model.config.width, generator=generator).to(model.decoder.embed_tokens.weight.dtype)
    targets_M = torch.randint(0, VOCAB, (rows,), generator=generator)
    return x_MD.requires_grad_(), targets_M, torch.rand(rows, generator=generator)


def gradients(model: nn.Decoder, x_MD: Tensor, value: Tensor) -> list[Tensor]:
    """Of the rows, the table, and all that the head owns."""
    weights = [model.lm_head.weight, *model.lm_head.parameters()]
    return list(torch.autograd.grad(value, [x_MD, *weights], retain_graph=True))


def assert_same(model: nn.Decoder, x_MD: Tensor, ours: Tensor, theirs: Tensor, tolerance: float = 1e-12) -> None:
    """Values and gradients, relative to the largest element; sums in float64 in another order differ by 1e-14."""
    found = [ours, *gradients(model, x_MD, ours)]
    wanted = [theirs, *gradients(model, x_MD, theirs)]
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())


# ---------------------------------------------------------------- the same, plainly


def plain_cross_entropy(model, x_MD, targets_M, weights_M, smoothing=0.0, z_loss=0.0):
    log_p_MV = torch.log_softmax(model.decoder.lm_head(x_MD), -1)
    hot_MV = F.one_hot(targets_M, VOCAB).to(log_p_MV.dtype)
    target_MV = (1 - smoothing) * hot_MV + smoothing / VOCAB
    penalty_M = z_loss * torch.logsumexp(model.decoder.lm_head(x_MD), -1).square()
    return (weights_M * (-(target_MV * log_p_MV).sum(-1) + penalty_M)).sum()


def plain_divergence(model, x_MD, teacher, y_ME, weights_M, beta, temperature):
    p_MV = torch.softmax(model.decoder.lm_head(x_MD) / temperature, -1)
    q_MV = torch.softmax(teacher.decoder.lm_head(y_ME) / temperature, -1).detach()

    def kl(a_MV, b_MV):
        return (a_MV * (a_MV.log() - b_MV.log())).sum(-1)

    if beta == 0:
        value_M = kl(q_MV, p_MV)
    elif beta == 1:
        value_M = kl(p_MV, q_MV)
    else:
        mixed_MV = beta * q_MV + (1 - beta) * p_MV
        value_M = beta * kl(q_MV, mixed_MV) + (1 - beta) * kl(p_MV, mixed_MV)
    return (weights_M * value_M).sum()


# ---------------------------------------------------------------- against it


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.2, 1e-2)])
def test_cross_entropy(head, smoothing, z_loss):
    model = model_with(head)
    x_MD, targets_M, weights_M = rows_of(model)
    loss = losses.cross_entropy(targets_M, weights_M, smoothing=smoothing, z_loss=z_loss)
    ours, each_M2 = model.decoder.lm_head.loss(x_MD, loss)
    assert_same(model, x_MD, ours, plain_cross_entropy(model, x_MD, targets_M, weights_M, smoothing, z_loss))
    nll_M = F.cross_entropy(model.decoder.lm_head(x_MD), targets_M, reduction="none")
    torch.testing.assert_close(each_M2[:, 1], (weights_M * nll_M).detach())


@pytest.mark.parametrize("head", HEADS)
def test_cross_entropy_against_some_tokens(head):
    model = model_with(head)
    x_MD, _, weights_M = rows_of(model)
    ids_MK = torch.stack([torch.randperm(VOCAB)[:7] for _ in range(ROWS)])
    probs_MK = torch.rand(ROWS, 7, dtype=torch.float64).softmax(-1)
    ours, _ = model.decoder.lm_head.loss(x_MD, losses.sampled_cross_entropy(ids_MK, probs_MK, weights_M))
    log_p_MK = torch.log_softmax(model.decoder.lm_head(x_MD), -1).gather(1, ids_MK)
    assert_same(model, x_MD, ours, -(weights_M[:, None] * probs_MK * log_p_MK).sum())


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (0.0, 2.5), (1.0, 1.0), (1.0, 0.7), (0.3, 1.0)])
def test_distillation(head, beta, temperature):
    model, teacher = model_with(head), model_with("biased", seed=5)
    x_MD, _, weights_M = rows_of(model)
    y_ME = rows_of(teacher, seed=6)[0]
    ours, _ = model.decoder.lm_head.loss(
        x_MD, losses.distillation(teacher, y_ME, weights_M, beta=beta, temperature=temperature)
    )
    assert_same(model, x_MD, ours, plain_divergence(model, x_MD, teacher, y_ME, weights_M, beta, temperature))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_and_entropy(head, temperature):
    """As functions of one another, as policies use them: the backward must take any derivative."""
    model = model_with(head)
    x_MD, targets_M, weights_M = rows_of(model)
    log_p_MV = torch.log_softmax(model.decoder.lm_head(x_MD) / temperature, -1)
    plain_M = log_p_MV.gather(1, targets_M[:, None])[:, 0]
    entropy_M = -(log_p_MV.exp() * log_p_MV).sum(-1)

    ours_M = model.decoder.lm_head.loss(x_MD, losses.token_logprobs(targets_M, temperature=temperature))
    assert_same(model, x_MD, (weights_M * ours_M).exp().sum(), (weights_M * plain_M).exp().sum())
    both_M2 = model.decoder.lm_head.loss(x_MD, losses.token_logprobs(targets_M, temperature=temperature, entropy=True))
    assert_same(model, x_MD, both_M2.prod(-1).sum(), (plain_M * entropy_M).sum())


@pytest.mark.parametrize("head", ["capped", "adapted"])
def test_torch_agrees_with_the_gradients(head):
    """Finite differences, which no formula of ours or of torch's enters."""
    model, teacher = model_with(head), model_with("plain", seed=5)
    x_MD, targets_M, weights_M = rows_of(model, rows=5)
    y_ME = rows_of(teacher, seed=6, rows=5)[0]

    def summed(x):
        return model.decoder.lm_head.loss(x, losses.cross_entropy(targets_M, weights_M, smoothing=0.1, z_loss=1e-2))[0]

    def divided(x):
        return model.decoder.lm_head.loss(x, losses.distillation(teacher, y_ME, weights_M, beta=0.4))[0]

    def mapped(x):
        return model.decoder.lm_head.loss(x, losses.token_logprobs(targets_M, entropy=True))

    for function in (summed, divided, mapped):
        assert torch.autograd.gradcheck(function, (x_MD,))


def test_a_tied_table_learns_as_embedding_and_as_head():
    model = model_with("capped")
    ids, targets_M, weights_M = torch.arange(40, 40 + ROWS), *rows_of(model)[1:]
    batch = nn.Batch.of([ids])
    plain = plain_cross_entropy(model, model(batch, output="hidden"), targets_M, weights_M)
    (wanted_VD,) = torch.autograd.grad(plain, [model.decoder.embed_tokens.weight])
    model.decoder.lm_head.loss(model(batch, output="hidden"), losses.cross_entropy(targets_M, weights_M))[0].backward()
    torch.testing.assert_close(model.decoder.embed_tokens.weight.grad, wanted_VD)
    assert model.decoder.lm_head.weight is model.decoder.embed_tokens.weight


def test_the_sum_can_be_scaled_and_parts_add_up():
    model = model_with("capped")
    x_MD, targets_M, weights_M = rows_of(model)
    whole = model.decoder.lm_head.loss(x_MD, losses.cross_entropy(targets_M, weights_M))[0]
    parts = [slice(0, 5), slice(5, 6), slice(6, None)]
    each = [model.decoder.lm_head.loss(x_MD[p], losses.cross_entropy(targets_M[p], weights_M[p]))[0] / 3 for p in parts]
    assert_same(model, x_MD, torch.stack(each).sum(), whole / 3)


@pytest.mark.parametrize("head", ["capped", "hooked"])
def test_float32_is_exact_to_its_rounding(head):
    model, exact = model_with(head, torch.float32), model_with(head)
    x_MD, targets_M, weights_M = rows_of(model)
    wanted = plain_cross_entropy(exact, x64_MD := x_MD.detach().double().requires_grad_(), targets_M, weights_M)
    ours = model.decoder.lm_head.loss(x_MD, losses.cross_entropy(targets_M, weights_M))[0]
    found = [ours, *gradients(model, x_MD, ours)]
    for a, b in zip(found, [wanted, *gradients(exact, x64_MD, wanted)], strict=True):
        assert (a - b).abs().max() <= 2e-6 * b.abs().max()  # 320 to 13 terms, each rounded at 6e-8 of itself


@pytest.mark.parametrize("head", ["plain", "capped", "adapted"])
def test_bfloat16_rows_are_summed_in_float32(head):
    """What is rounded to bfloat16 is what the plain way rounds: logits, their gradient, the products with it."""
    model = model_with(head, torch.bfloat16)
    x_MD, targets_M, weights_M = rows_of(model)
    plain = plain_cross_entropy(model, x_MD, targets_M, weights_M)  # a float32 weight makes the sum float32
    ours = model.decoder.lm_head.loss(x_MD, losses.cross_entropy(targets_M, weights_M))[0]
    assert ours.dtype == torch.float32
    exact = model_with(head)
    exact.load_state_dict({name: weight.double() for name, weight in model.state_dict().items()})
    x64_MD = x_MD.detach().double().requires_grad_()
    true = plain_cross_entropy(exact, x64_MD, targets_M, weights_M)
    for a, b, c in zip(
        [ours, *gradients(model, x_MD, ours)],
        [plain, *gradients(model, x_MD, plain)],
        [true, *gradients(exact, x64_MD, true)],
        strict=True,
    ):
        assert a.dtype == b.dtype or a.dim() == 0
        error, plainly = ((part.double() - c).abs().max() / c.abs().max() for part in (a, b))
        assert error <= max(2 * plainly, 2**-8)  # no worse than the plain way, or than rounding once


def test_a_quantized_table_is_made_dense_a_block_at_a_time(monkeypatch):
    monkeypatch.setattr(chunked, "_BLOCK", 16)
    kind = KINDS["Q8_0"]
    config = replace(tiny("gemma-2-2b"), width=32)
    model = nn.Decoder(replace(config, layers=config.layers[:1]))
    codes = torch.randint(-100, 100, (VOCAB, 32), dtype=torch.int8)
    scales = torch.rand(VOCAB, 1).to(torch.float16) / 100
    model.set_param("embed_tokens.weight", table := Quantized(kind, {"codes": codes, "scales": scales}, (VOCAB, 32)))
    dense = nn.Decoder(model.config)
    dense.set_param("embed_tokens.weight", Parameter(table.dequantize(), requires_grad=False))
    x_MD, targets_M, weights_M = rows_of(dense)
    assert ways(monkeypatch, model, x_MD) == {"_TableChunk"}
    ours = model.decoder.lm_head.loss(x_MD, losses.cross_entropy(targets_M, weights_M))[0]
    theirs = dense.decoder.lm_head.loss(x_MD, losses.cross_entropy(targets_M, weights_M))[0]
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, [x_MD])[0] for loss in (ours, theirs)))


def test_dropout_of_an_adapter_falls_the_same_in_the_backward():
    model = model_with("adapted").train()
    model.decoder.lm_head.adapters["default"].dropout = 0.5
    x_MD, targets_M, _ = rows_of(model)
    torch.manual_seed(3)
    ours_M = model.decoder.lm_head.loss(x_MD, losses.token_logprobs(targets_M))
    torch.rand(7)  # what comes between the two
    ours = gradients(model, x_MD, ours_M.sum())
    torch.manual_seed(3)
    chunks = [model.decoder.lm_head(x_MD[c.start : c.stop]) for c in chunked._chunks(ROWS, VOCAB)]
    plain_M = torch.log_softmax(torch.cat(chunks), -1).gather(1, targets_M[:, None])[:, 0]
    for a, b in zip(ours, gradients(model, x_MD, plain_M.sum()), strict=True):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------- how much is held, and the way chosen


def ways(monkeypatch, model: nn.Decoder, x_MD: Tensor) -> set[str]:
    """How the head reads its chunks, by the class that does it."""
    chosen = set()
    for kind in (chunked._TableChunk, chunked._ModuleChunk):
        read = kind.read

        def note(self, *args, read=read):
            chosen.add(type(self).__name__)
            read(self, *args)

        monkeypatch.setattr(kind, "read", note)
    model.decoder.lm_head.loss(x_MD, losses.token_logprobs(torch.zeros(len(x_MD), dtype=torch.int64)))
    return chosen


@pytest.mark.parametrize(
    ("head", "way"),
    [
        ("plain", "_TableChunk"),
        ("capped", "_TableChunk"),
        ("hooked", "_ModuleChunk"),
        ("adapted", "_ModuleChunk"),
        ("biased", "_ModuleChunk"),
    ],
)
def test_the_way_is_chosen_by_the_head(head, way, monkeypatch):
    model = model_with(head)
    assert ways(monkeypatch, model, rows_of(model)[0]) == {way}


def test_no_tensor_holds_all_logits(monkeypatch):
    """Of every tensor that is made on the way, none has more elements than a chunk of logits and its slab."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() != table_bytes:
                    largest = max(largest, tensor.numel())
            return out

    for head in ("capped", "adapted"):
        model = model_with(head)
        table_bytes = model.decoder.embed_tokens.weight.untyped_storage().nbytes()
        x_MD, targets_M, weights_M = rows_of(model, rows=64)
        largest = 0
        with Watch():
            model.decoder.lm_head.loss(x_MD, losses.cross_entropy(targets_M, weights_M))[0].backward()
            model.decoder.lm_head.loss(x_MD, losses.token_logprobs(targets_M)).sum().backward()
        assert 0 < largest <= max(4 * VOCAB, model.decoder.embed_tokens.weight.numel())


@pytest.mark.parametrize("rows", [1, 4, 5, 13, 16])
def test_chunks_are_as_few_as_can_be_and_alike(rows):
    chunks = [*chunked._chunks(rows, VOCAB)]
    assert [row for chunk in chunks for row in chunk] == list(range(rows))
    assert len(chunks) == -(-rows // 4)
    assert max(map(len, chunks)) - min(map(len, chunks)) <= 1


def test_a_vocabulary_beyond_a_chunk_goes_row_by_row(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", VOCAB // 2)
    assert [*chunked._chunks(3, VOCAB)] == [range(1), range(1, 2), range(2, 3)]


# ---------------------------------------------------------------- edges


@pytest.mark.parametrize("head", ["plain", "capped", "adapted"])
def test_no_row_at_all_is_no_loss(head):
    model = model_with(head)
    x_MD = torch.zeros(0, model.config.width, dtype=torch.float64, requires_grad=True)
    none_M = torch.zeros(0, dtype=torch.int64)
    total, each_M2 = model.decoder.lm_head.loss(x_MD, losses.cross_entropy(none_M, torch.zeros(0)))
    total.backward()
    assert total == 0
    assert each_M2.shape == (0, 2)
    assert x_MD.grad is not None
    assert x_MD.grad.shape == x_MD.shape
    assert model.decoder.lm_head.loss(x_MD, losses.token_logprobs(none_M)).shape == (0,)
    assert model.decoder.lm_head.loss(x_MD, losses.token_logprobs(none_M, entropy=True)).shape == (0, 2)


def test_logits_far_apart_neither_overflow_nor_vanish():
    model = model_with("plain", torch.float32)
    x_MD, targets_M, weights_M = rows_of(model)
    x_MD = (1e4 * x_MD).detach().requires_grad_()
    for ours in (
        model.decoder.lm_head.loss(x_MD, losses.cross_entropy(targets_M, weights_M))[0],
        model.decoder.lm_head.loss(x_MD, losses.token_logprobs(targets_M, entropy=True)).sum(),
        model.decoder.lm_head.loss(x_MD, losses.distillation(model, x_MD.flip(0), weights_M, beta=1))[0],
        model.decoder.lm_head.loss(x_MD, losses.distillation(model, x_MD.flip(0), weights_M))[0],
        model.decoder.lm_head.loss(x_MD, losses.distillation(model, x_MD.flip(0), weights_M, beta=0.5))[0],
    ):
        assert ours.isfinite()
        assert all(part.isfinite().all() for part in gradients(model, x_MD, ours))


def test_without_gradients_nothing_is_recorded():
    model = model_with("capped")
    x_MD, targets_M, weights_M = rows_of(model)
    with torch.no_grad():
        assert not model.decoder.lm_head.loss(x_MD, losses.cross_entropy(targets_M, weights_M))[0].requires_grad
        assert not model.decoder.lm_head.loss(x_MD, losses.token_logprobs(targets_M)).requires_grad
    with torch.inference_mode():
        model.decoder.lm_head.loss(x_MD.detach(), losses.token_logprobs(targets_M))


@pytest.mark.parametrize("settings", [{"smoothing": 1.0}, {"smoothing": -0.1}, {"z_loss": -1.0}])
def test_settings_that_cannot_be_are_refused(settings):
    model = model_with("plain")
    with pytest.raises(ConfigError, match="smoothing="):
        losses.cross_entropy(*rows_of(model)[1:], **settings)


# ---------------------------------------------------------------- what the teacher's draw is


def test_a_teacher_is_drawn_by_its_probabilities():
    teacher = model_with("plain", seed=5)
    y_ME = rows_of(teacher, seed=6, rows=1)[0].detach().expand(4000, -1)
    p_V = torch.softmax(teacher.decoder.lm_head(y_ME[:1])[0] / 4, -1)  # flatter, so that many tokens are drawn
    teacher.decoder.embed_tokens.weight.data /= 4
    ids_MK, probs_MK = losses.sample_teacher(
        partial(teacher.decoder.lm_head.loss, y_ME), 3, torch.Generator().manual_seed(0)
    )
    assert ids_MK.shape == probs_MK.shape == (4000, 3)
    assert (ids_MK.sort(-1).values.diff(dim=-1) > 0).all(), "drawn twice"
    torch.testing.assert_close(probs_MK, F.normalize(p_V[ids_MK], p=1, dim=-1))
    # the first of a draw without putting back is the most likely place to see the probabilities themselves: draw one
    ids_M1, _ = losses.sample_teacher(partial(teacher.decoder.lm_head.loss, y_ME), 1, torch.Generator().manual_seed(1))
    share_V = torch.bincount(ids_M1[:, 0], minlength=VOCAB) / 4000
    assert (share_V - p_V).abs().max() < 5 * (p_V.max() / 4000).sqrt()  # five standard deviations of the largest share
