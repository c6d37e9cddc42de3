"""The image tower in C++ against the modules that it was traced from."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from gemkit import nn
from gemkit.block_types import KINDS
from gemkit.errors import ConfigError, ModelError
from gemkit.executors.native.packer import pack
from gemkit.executors.native.packfile import Pack
from gemkit.executors.native.tower import NativeTower, patches_of
from gemkit.family import Modality, Vision
from gemkit.weights.quantize import nearest
from support.tiny import TOWER, tiny

# 100 patches: more than a page of keys and not whole pages; heads of 72, as published, and widths of whole blocks
_WIDE = Vision(40, patch_size=4, width=288, depth=2, num_heads=4, mlp_width=320)
WIDE = Modality(_WIDE, placeholder=TOWER.placeholder)


def randomised(vision: Modality, dtype: torch.dtype = torch.float32) -> nn.Multimodal:
    generator = torch.Generator().manual_seed(0)
    decoder = tiny("paligemma-3b-pt-224")
    module = nn.Multimodal(replace(decoder, layers=decoder.layers[:1]), vision)
    with torch.no_grad():
        for path, weight in module.named_parameters():
            gain = 1.5 if "q_proj" in path or "k_proj" in path else 1
            small = "norm" in path or "bias" in path
            fan_in = weight[0].numel() if weight.dim() > 1 else 1
            weight.normal_(0, 0.3 if small else gain / fan_in**0.5, generator=generator)
            if "layer_norm" in path or "post_layernorm.weight" in path:
                weight.add_(float(path.endswith("weight")))
    return module.to(dtype).eval()


def images(vision: Modality, count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    size = vision.tower.image_size
    return [rng.uniform(-1, 1, (3, size, size)).astype(np.float32) for _ in range(count)]


def tower(module: nn.Multimodal, packed: Pack | None = None) -> NativeTower:
    return NativeTower(module.vision, module.config.width, pack(module) if packed is None else packed)


@torch.inference_mode()
def expected(module: nn.Multimodal, shown: list[np.ndarray]) -> np.ndarray:
    dtype = module.multi_modal_projector.linear.bias.dtype
    return module.image_features(torch.from_numpy(np.stack(shown)).to(dtype)).float().numpy()


def off(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("vision", [TOWER, WIDE], ids=["16 patches", "100 patches"])
@pytest.mark.parametrize("count", [1, 3])
def test_features_are_those_of_the_modules(vision, count):
    """2e-5 of the largest: float32 sums in another order."""
    module, shown = randomised(vision), images(vision, count)
    assert off(tower(module).features(shown), expected(module, shown)) < 2e-5


def test_an_image_has_the_same_features_alone():
    module, shown = randomised(WIDE), images(WIDE, 3)
    ours = tower(module)
    assert np.array_equal(ours.features(shown), np.concatenate([ours.features([image]) for image in shown]))


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_gives_the_features(isa, tmp_path):
    """In a process of its own: kernels are chosen once. Where the machine lacks a set, nothing is computed."""
    module, shown = randomised(TOWER), images(TOWER, 2)
    packed = pack(module, tmp_path / "model")
    np.save(tmp_path / "expected.npy", tower(module, packed).features(shown))
    program = """
import sys
from pathlib import Path
import numpy as np
from gemkit.errors import ConfigError
from gemkit.executors.native import library
from gemkit.executors.native.packfile import Pack
from gemkit.executors.native.tower import NativeTower
from test_tower import TOWER, images
folder = Path(sys.argv[1])
try:
    assert library.available() == (True, sys.argv[2])
except ConfigError as error:
    assert f"GEMKIT_ISA='{sys.argv[2]}': the kernels here are " in str(error), error
    sys.exit(0)
expected = np.load(folder / "expected.npy")
features = NativeTower(TOWER, expected.shape[1], Pack(folder / "model")).features(images(TOWER, 2))
assert np.abs(features - expected).max() <= 1e-5 * np.abs(expected).max(), np.abs(features - expected).max()
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), isa],
        env={**os.environ, "GEMKIT_ISA": isa, "PYTHONPATH": os.pathsep.join([*sys.path, os.path.dirname(__file__)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_weights_in_bfloat16_are_multiplied_with_float32_activations():
    """Torch rounds what is between two ops to bfloat16, the kernels do not: they give the features that the same
    weights have in float32."""
    module, shown = randomised(WIDE, torch.bfloat16), images(WIDE, 2)
    ours, in_torch = tower(module).features(shown), expected(module, shown)
    exact = expected(module.float(), shown)
    assert off(ours, exact) < 2e-5
    assert off(in_torch, exact) > 1e-3


def test_a_quantized_tower_runs_as_the_decoder_does():
    """3e-2 of the largest: activations are int8 with a scale for each 32, as in front of every quantized weight."""
    module, shown = randomised(WIDE), images(WIDE, 2)
    for path, weight in list(module.named_parameters()):
        if path.startswith("vision_tower.encoder") and weight.dim() == 2:
            module.set_param(path, nearest(weight, KINDS["Q8_0"], path))
    got, wanted = tower(module).features(shown), expected(module, shown)
    assert 1e-4 < off(got, wanted) < 3e-2


def test_the_tolerance_would_notice():
    """Of another epsilon in the norms."""
    module, shown = randomised(WIDE), images(WIDE, 1)
    other = nn.Multimodal(module.config, replace(WIDE, tower=replace(WIDE.tower, norm_eps=1e-3)))
    other.load_state_dict(module.state_dict())
    assert off(tower(module).features(shown), expected(other, shown)) > 1e-4


def test_another_resolution_is_refused():
    with pytest.raises(ConfigError, match=r"this tower sees \(images, 3, 56, 56\)"):
        tower(randomised(TOWER)).features(images(WIDE, 1))


def test_a_pack_of_text_alone_has_no_tower():
    module = randomised(TOWER)
    of_text = pack(module.language_model)
    with pytest.raises(ModelError, match="holds no image tower"):
        tower(module, of_text)


def test_a_damaged_tower_is_refused_or_runs_within_its_bounds(tmp_path):
    """Whatever a word of its steps and buffers says: an error of ours, never memory of others."""
    module, shown = randomised(TOWER), images(TOWER, 1)
    whole = pack(module, tmp_path / "model")
    assert whole.tower is not None
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = Pack(tmp_path / "model")
        arrays = [array.copy() for array in whole.tower]
        array = arrays[rng.integers(2)]
        row, column = rng.integers(array.shape[0]), rng.integers(array.shape[1])
        array[row, column] = rng.choice([-1, 0, 1, 7, 2**31 - 1, -(2**31), int(rng.integers(-100, 10_000))])
        damaged.tower = (arrays[0], arrays[1])
        try:
            tower(module, damaged).features(shown)
        except ModelError:
            refused += 1
    assert refused > 100


def test_patches_are_rows_in_the_order_of_the_kernel():
    pixels = np.arange(2 * 3 * 4 * 4, dtype=np.float32).reshape(2, 3, 4, 4)
    rows = patches_of(pixels, 2)
    assert rows.shape == (8, 12)
    assert rows[1].tolist() == pixels[0, :, 0:2, 2:4].reshape(-1).tolist()
    assert rows[6].tolist() == pixels[1, :, 2:4, 0:2].reshape(-1).tolist()
