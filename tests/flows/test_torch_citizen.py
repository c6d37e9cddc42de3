"""Opened modules as PyTorch's own tools see them: printed, summed up, listed, copied, saved, moved."""

import copy
import io

import pytest
import torch
import torchinfo

import gemkit
from gemkit.inspect import cost
from support.tiny_models import write

NAMES = ["gemma-2b", "gemma-2-2b", "gemma-3-1b", "recurrentgemma-2b", "paligemma-3b-mix-224"]
IDS = torch.tensor([[2, 11, 5, 17, 3], [2, 29, 8, 13, 7]])


@pytest.fixture(scope="module", params=NAMES)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / request.param
    write(folder, request.param)
    return gemkit.load(folder)


def count(model) -> int:
    return cost.count(model.config, model.vision).total


def test_it_prints_as_pytorch_prints_and_opens_nothing(model):
    tree = str(model)
    assert not model.runtime.is_open, "printing a model reads no weights"
    assert tree == str(model.module)
    assert "(q_proj): Linear(in_features=" in tree
    assert "(lm_head): Head(" in tree
    assert "tied to embed_tokens" in tree


def test_the_tied_table_counts_once(model):
    names = [name for name, _ in model.module.named_parameters()]
    assert len(set(names)) == len(names)
    assert [name.endswith("embed_tokens.weight") for name in names].count(True) == 1
    assert not any("lm_head" in name for name in names)
    assert sum(weight.numel() for weight in model.module.parameters()) == count(model)
    assert model.module.decoder.lm_head.weight is model.module.decoder.embed_tokens.weight


def test_torchinfo_sums_it_up(model):
    summary = torchinfo.summary(model.module, input_data=[IDS], depth=4, verbose=0)
    assert summary.total_params == count(model)
    assert summary.trainable_params == 0, "loaded weights record no gradients"
    decoder = getattr(model.module, "language_model", model.module)
    shapes = {layer.class_name: layer.output_size for layer in summary.summary_list}
    assert shapes["Embedding"] == [IDS.numel(), model.config.width]  # rows laid end to end
    assert shapes["Head"] == [IDS.numel(), model.config.vocab_size]
    assert sum(layer.class_name == "Block" for layer in summary.summary_list) == len(decoder.layers)
    assert sum(layer.class_name == type(model.module).__name__ for layer in summary.summary_list) == 1, "entered once"


def test_hooks_see_one_forward_pass(model):
    seen = []
    decoder = getattr(model.module, "language_model", model.module)
    handles = [part.register_forward_hook(lambda *_: seen.append(1)) for part in (decoder, decoder.layers[0])]
    with torch.inference_mode():
        model.module(IDS)
    for handle in handles:
        handle.remove()
    assert len(seen) == 2


def test_state_dict_goes_out_and_in(model):
    ours = model.module
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(ours)
    assert other.decoder.lm_head.weight is other.decoder.embed_tokens.weight
    with torch.no_grad():
        for weight in other.parameters():
            weight.zero_()
    assert other.load_state_dict(torch.load(file, weights_only=True)) == ([], [])
    with torch.inference_mode():
        assert torch.equal(other(IDS), ours(IDS))


def test_it_moves_to_another_dtype_with_its_tie(model):
    other = copy.deepcopy(model.module).to(torch.float64)
    assert {weight.dtype for weight in other.parameters()} == {torch.float64}
    assert other.decoder.lm_head.weight is other.decoder.embed_tokens.weight
