"""Packed from its files, a checkpoint has the bytes that its modules have."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemkit.executors.native import packer
from gemkit.executors.native.packfile import Pack
from gemkit.executors.native.writer import write_pack
from gemkit.runtime.checkpoint_weights import CheckpointWeights
from gemkit.weights.checkpoint import find
from gemkit.weights.export.gguf import save_gguf
from gemkit.weights.export.hf import save_hf
from gemkit.weights.export.torch_checkpoint import save_torch_checkpoint
from gemkit.weights.load import load_module
from support.native_models import randomised
from support.tiny_models import write


def both(place, tmp_path) -> tuple[Pack, Pack]:
    with find(place) as checkpoint:
        weights = CheckpointWeights(checkpoint)
        assert weights.heads_are_tied()
        ours = write_pack(weights.programs(), weights, tmp_path / "ours", "of this")
        module, report = load_module(checkpoint)
        theirs = packer.pack(module, tmp_path / "theirs", "of this", report.notes)
    return ours, theirs


def assert_same(ours: Pack, theirs: Pack) -> None:
    assert ours.path.read_bytes() == theirs.path.read_bytes()
    assert ours.damaged() == []


@pytest.mark.parametrize("name", ["gemma-2b", "gemma-2-2b", "gemma-3-4b", "recurrentgemma-2b", "paligemma-3b-pt-224"])
def test_a_folder(tmp_path, name):
    write(tmp_path / "model", name)
    assert_same(*both(tmp_path / "model", tmp_path))


@pytest.mark.parametrize("dtypes", [("float16",), ("bfloat16",), ("bfloat16", "float32", "float16")])
def test_stored_types_and_what_the_run_dtype_rounds(tmp_path, dtypes):
    """Several in one file: each in the run dtype that modules would have, with the same note of what was rounded."""
    write(tmp_path / "model", "gemma-3-1b")
    (file,) = (tmp_path / "model").glob("*.safetensors")
    tensors = load_file(file)
    for i, (name, value) in enumerate(sorted(tensors.items())):
        tensors[name] = value.to(getattr(torch, dtypes[i % len(dtypes)]))
    save_file(tensors, file, {"format": "pt"})
    ours, theirs = both(tmp_path / "model", tmp_path)
    assert_same(ours, theirs)
    assert len(ours.notes) >= len(dtypes) - 1


@pytest.mark.parametrize("name", ["gemma-2-2b", "gemma-3-1b"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_gguf(tmp_path, name, dtype):
    """Norms plus one, in float32 beside whatever matrices are."""
    write(tmp_path / "model", name)
    with find(tmp_path / "model") as checkpoint:
        module, _ = load_module(checkpoint)
        save_gguf(module, tmp_path / "model.gguf", tokenizer=checkpoint.tokenizer, dtype=dtype)
    assert_same(*both(tmp_path / "model.gguf", tmp_path))


def test_quantized_planes_of_a_folder(tmp_path):
    save_hf(randomised("gemma-2-2b", quantized=True), tmp_path / "model", quantized=True)
    assert_same(*both(tmp_path / "model", tmp_path))


def test_the_starter(tmp_path):
    """Blocks of several kinds, and a table with a sketch."""
    assert_same(*both(None, tmp_path))


@pytest.mark.slow
def test_fused_and_turned_matrices(tmp_path):
    """The formats without a configuration are read as the member of their shapes: one of the smallest at full width."""
    from gemkit import family
    from gemkit.nn import Decoder

    torch.manual_seed(0)
    module = Decoder(family.get("gemma-3-270m").decoder)
    save_torch_checkpoint(module, tmp_path / "model.ckpt", dtype=torch.bfloat16)
    assert_same(*both(tmp_path / "model.ckpt", tmp_path))


def test_a_copy_of_the_head_is_compared(tmp_path):
    write(tmp_path / "model", "gemma-2b")
    (file,) = (tmp_path / "model").glob("*.safetensors")
    tensors = load_file(file)
    (table,) = (value for name, value in tensors.items() if "embed_tokens" in name)
    for head, tied in ((table.clone(), True), (table + 1, False)):
        save_file({**tensors, "lm_head.weight": head}, file, {"format": "pt"})
        with find(tmp_path / "model") as checkpoint:
            assert CheckpointWeights(checkpoint).heads_are_tied() is tied
