"""Packing: every weight of the module at its place, with its own numbers."""

import numpy as np
import pytest
import torch

from gemkit import nn
from gemkit.errors import ModelError
from gemkit.executors.native.packer import pack
from gemkit.executors.native.packfile import KINDS, PLAIN
from gemkit.family import parameters
from support import native_library
from support.tiny import TOWER, tiny


def randomised(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 1, generator=generator)
    return module


def unpacked(pack, entry) -> np.ndarray:
    if entry.kind == PLAIN:
        return pack.bytes_of(entry).view(np.float32)
    kind = native_library.KINDS[entry.kind]
    like = {"dense": np.empty((entry.rows, entry.cols), np.float32)}
    return native_library.unpack(kind, entry.rows, entry.cols, pack.bytes_of(entry), like)["dense"]


def test_every_weight_is_in_the_pack_with_its_numbers():
    """Of the decoder and of the tower; a kernel of patches as a matrix."""
    module = randomised(nn.Multimodal(tiny("paligemma-3b-pt-224"), TOWER))
    packed = pack(module)
    entries = {entry.name: entry for entry in packed.table if not entry.name.startswith("rope")}
    names = [name.removeprefix("language_model.") for name, _ in parameters(module.config, module.vision)]
    assert set(entries) == set(names)
    for name, parameter in module.named_parameters():
        entry = entries[name.removeprefix("language_model.")]
        assert np.array_equal(unpacked(packed, entry).reshape(parameter.shape), parameter.detach().numpy()), name


def test_notes_and_source_are_kept(tmp_path):
    packed = pack(randomised(nn.Decoder(tiny("gemma-2b"))), tmp_path / "model", "source", ["read so"])
    assert (packed.source, packed.notes, packed.path) == ("source", ["read so"], tmp_path / "model")


def test_a_dtype_without_kernels_is_named():
    module = randomised(nn.Decoder(tiny("gemma-2b"))).to(torch.float64)
    with pytest.raises(ModelError, match=r"is float64 .*: no kind of the native executor"):
        pack(module)
    assert "float64" not in KINDS
