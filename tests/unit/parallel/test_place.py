"""Two processes: each way to divide a model has the loss and the gradients of one process.

Tolerances: 2e-5 of a gradient's largest element, for float32 sums in another order.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from gemkit.errors import TrainingError
from gemkit.parallel.layout import Layout, Shard
from support import meshes, ranks

MEMBERS = ("gemma-2b", "gemma-2-2b", "gemma-3-1b", "recurrentgemma-2b", "paligemma-3b-mix-224")


def _compare(model, shape: str, **options) -> None:
    """Units dealt unequally: the last rank of the batch axis has one of five."""
    units = meshes.units(model.vision)
    model.zero_grad()
    total = meshes.loss(model, units)
    total.backward()
    wanted = {name: weight.grad for name, weight in model.named_parameters()}
    made = meshes.divided(model, shape, **options)
    data = int(shape[0])
    mine = units if data == 1 else (units[:4], units[4:])[dist.get_rank()]
    ours = meshes.loss(made, mine)
    (ours * data).backward()  # FSDP takes the mean over ranks
    summed = ours.detach().clone()
    if data > 1:
        dist.all_reduce(summed)
    assert abs(float(summed - total.detach()) / float(total.detach())) < 1e-5
    error, name = meshes.off(made, wanted)
    assert error < 2e-5, (shape, name, error)


def check_gradients_of_every_member_equal_one_process(folder: Path) -> None:
    for name in MEMBERS:
        layers = 3 if name.startswith("recurrent") else 2
        model = meshes.whole(*meshes.member(name, layers))
        for shape in ("1x2", "2x1"):
            _compare(model, shape)


def check_each_stage_of_zero_has_the_same_gradients(folder: Path) -> None:
    model = meshes.whole(*meshes.member("gemma-2b"))
    for zero in (0, 1, 2):
        _compare(model, "2x1", zero=zero)


def check_the_residual_axis_can_be_divided(folder: Path) -> None:
    """The announcement's map: partial sums after q, k, v, gate and up, pieces out of o and down."""
    layout = Layout({
        "embed_tokens": Shard(1, "model"), r"[qkv]_proj|gate_proj|up_proj": Shard(1, "model"),
        "o_proj|down_proj": Shard(0, "model"), "norm": None,
    })  # fmt: skip
    model = meshes.whole(*meshes.member("gemma-2b"))
    _compare(model, "1x2", layout=layout)


def check_every_row_loss_of_a_divided_vocabulary_is_that_of_the_whole(folder: Path) -> None:
    model = meshes.whole(*meshes.member("gemma-2-2b"))
    units, made = meshes.units(None), meshes.divided(model, "1x2")
    for options in ({"smoothing": 0.1, "z_loss": 1e-3}, {}):
        model.zero_grad()
        made.zero_grad()
        meshes.loss(model, units, **options).backward()
        meshes.loss(made, units, **options).backward()
        error, name = meshes.off(made, {n: w.grad for n, w in model.named_parameters()})
        assert error < 2e-5, (options, name, error)


def check_a_single_key_head_has_the_same_bits_on_all_ranks(folder: Path) -> None:
    """Its gradient is a part on each: without the sum the ranks would drift apart, and no loss would show it."""
    made = meshes.divided(meshes.whole(*meshes.member("gemma-2b")), "1x2")
    adamw = torch.optim.AdamW(made.parameters(), lr=1e-2)
    for seed in range(3):
        meshes.loss(made, meshes.units(None, seed=seed)).backward()
        adamw.step()
        adamw.zero_grad()
    for name, weight in made.named_parameters():
        if weight.placements[-1].is_replicate():
            mine = weight.to_local().detach()
            other = mine.clone()
            dist.broadcast(other, 0)
            assert torch.equal(mine, other), name
    assert made.layers[0].self_attn.k_proj.weight.placements[-1].is_replicate()


def check_no_rank_holds_a_whole_divided_weight_or_all_logits(folder: Path) -> None:
    model = meshes.whole(*meshes.member("gemma-2b"))
    made = meshes.divided(model, "1x2")
    seen: list[torch.Size] = []

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made = [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, torch.Tensor)]
            seen.extend(t.shape for t in made if not isinstance(t, DTensor) and not t.is_meta)
            return out

    vocab, width = model.config.vocab_size, model.config.width
    heads = model.layers[0].self_attn.q_proj.weight.shape[0]
    with Shapes():
        meshes.loss(made, meshes.units(None)).backward()
    plain = {tuple(shape) for shape in seen}
    assert not any(len(s) == 2 and s[1] == vocab for s in plain), "all logits of a row"
    for shape in ((vocab, width), (heads, width), (width, heads), (96, width), (width, 96)):
        assert shape not in plain, shape
    held = sum(weight.to_local().numel() for weight in made.parameters())
    assert held < 0.6 * sum(weight.numel() for weight in model.parameters())


def check_a_part_of_the_model_outside_of_its_forward_is_refused(folder: Path) -> None:
    """Between forwards a block's weights are pieces: nothing may compute with those without a word."""
    made = meshes.divided(meshes.whole(*meshes.member("gemma-2b")), "1x2")
    with pytest.raises(TrainingError, match="outside of the model's own forward"):
        made.layers[0].mlp(torch.zeros(1, made.config.width))


def check_bfloat16_is_summed_in_float32(folder: Path) -> None:
    """The gradient of a float32 master is that of the same weights in bfloat16 in one process, to a few of its bits."""
    model = meshes.whole(*meshes.member("gemma-3-1b"), dtype=torch.bfloat16)
    units = meshes.units(None)
    meshes.loss(model, units).backward()
    wanted = {name: weight.grad.float() for name, weight in model.named_parameters()}
    made = meshes.divided(model, "2x1", dtype=torch.bfloat16)
    assert all(weight.dtype == torch.float32 for weight in made.parameters())
    (2 * meshes.loss(made, units[:3] if dist.get_rank() == 0 else units[3:])).backward()
    norms = [torch.cat([meshes.full(g).flatten() for g in grads]).norm() for grads in (
        wanted.values(), [weight.grad for weight in made.parameters()])]  # fmt: skip
    assert abs(norms[0] / norms[1] - 1) < 0.01


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return ranks.run(__file__, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in globals() if name.startswith("check_")])
def test_in_two_processes(found, name):
    assert found[name] == "", found[name]
