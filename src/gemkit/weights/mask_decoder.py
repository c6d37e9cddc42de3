"""The published weights of the mask decoder and its encoder: `vae-oid.npz` of google-research/big_vision.

The file is a NumPy archive of arrays in PyTorch's layout. What its layers are called there and here is the table
below; each has a `weight` and a `bias`. The codebook's width, and all widths of the encoder, are the file's own.

Source: google-research/big_vision, evaluators/proj/paligemma/transfers/segmentation.py (`_get_params`) and
pp/proj/paligemma/segmentation.py (`encode_to_codebook_indices`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from gemkit.errors import WeightsError
from gemkit.weights.formats.npz import NpzReader

if TYPE_CHECKING:
    from torch.nn import Module

    from gemkit.nn.mask_decoder import MaskDecoder, MaskEncoder


def _residuals(side: str, first: int) -> dict[str, str]:
    return {
        f"{side}.{first + block}.net.{2 * conv}": f"residuals.{block}.convs.{conv}"
        for block in range(2)
        for conv in range(3)
    }


CODEBOOK = "_vq_vae._embedding"  # codebook.weight here

# layer in the file -> ours
DECODER = {
    "decoder.0": "enter",
    **_residuals("decoder", 2),
    **{f"decoder.{4 + 2 * n}": f"enlarge.{n}" for n in range(4)},
    "decoder.12": "leave",
}
ENCODER = {
    **{f"encoder.{2 * n}": f"shrink.{n}" for n in range(4)},
    **_residuals("encoder", 8),
    "encoder.10": "leave",
}

# More than a published file can need: a small file that unfolds to gigabytes is refused before it does.
MAX_CHANNELS = 1024
MAX_KERNEL = 8


def load_mask_decoder(path: str | os.PathLike[str]) -> MaskDecoder:
    """The decoder of codes to masks, in float32, for inference.

    The codebook and every decoder layer must be there, with the shapes of the published architecture, and no further
    decoder layer. Arrays that are not the decoder's, such as the encoder's, are not read.

    Raises:
        WeightsError: if the file is no NumPy archive, or damaged; if an array is missing, misshapen, unexpected, or
            anything but floating-point numbers.
    """
    from gemkit.nn.mask_decoder import MaskDecoder

    with NpzReader(path) as reader:
        _check_names(reader, DECODER)
        module = MaskDecoder(_codebook_width(reader))
        _fill(module, reader, DECODER)
    return module.eval()


def load_mask_encoder(path: str | os.PathLike[str]) -> MaskEncoder:
    """The encoder of masks to codes, in float32, for inference, with the widths and kernels that the file has.

    Raises:
        WeightsError: as `load_mask_decoder`; or if what one layer gives is not what the next one takes.
    """
    from gemkit.nn.mask_decoder import MaskEncoder

    with NpzReader(path) as reader:
        _check_names(reader, ENCODER)
        shapes, channels = [], 1
        for layer in ENCODER:
            shape = reader.entries[f"{layer}.weight"].shape
            if len(shape) != 4 or shape[1] != channels:
                raise WeightsError(f"{path}: {layer}.weight is {shape}; it takes {channels} channels, (out, in, y, x)")
            if not (0 < shape[0] <= MAX_CHANNELS and all(0 < size <= MAX_KERNEL for size in shape[2:])):
                raise WeightsError(
                    f"{path}: {layer}.weight is {shape}; at most {MAX_CHANNELS} channels and kernels of {MAX_KERNEL} "
                    "are believed"
                )
            channels = shape[0]
            shapes.append(shape)
        shrink, residuals, leave = shapes[:4], [shapes[4:7], shapes[7:10]], shapes[10]
        for block in residuals:
            if block[0][1] != block[2][0]:
                raise WeightsError(f"{path}: a residual block takes {block[0][1]} channels and gives {block[2][0]}")
        if leave[0] != _codebook_width(reader):
            raise WeightsError(
                f"{path}: the encoder gives {leave[0]} channels, the codebook's width is {_codebook_width(reader)}"
            )
        module = MaskEncoder(shrink, residuals, leave)
        _fill(module, reader, ENCODER)
    return module.eval()


def _check_names(reader: NpzReader, layers: Mapping[str, str]) -> None:
    """Every array of these layers and the codebook, and no other layer of their side."""
    wanted = {CODEBOOK, *(f"{layer}.{part}" for layer in layers for part in ("weight", "bias"))}
    side = next(iter(layers)).partition(".")[0]
    if missing := sorted(wanted - set(reader.entries)):
        raise WeightsError(
            f"{reader.path}: {len(missing)} of {len(wanted)} arrays of the mask {side} are missing, the first is "
            f"{missing[0]}: is it big_vision's vae-oid.npz?"
        )
    if unknown := sorted(name for name in reader.entries if name.startswith(f"{side}.") and name not in wanted):
        raise WeightsError(f"{reader.path}: {unknown[0]} is no layer of the mask {side}: another architecture")


def _codebook_width(reader: NpzReader) -> int:
    from gemkit.nn.mask_decoder import CODES

    shape = reader.entries[CODEBOOK].shape
    if len(shape) != 2 or shape[0] != CODES or not 0 < shape[1] <= MAX_CHANNELS:
        raise WeightsError(
            f"{reader.path}: {CODEBOOK} is {shape}; a codebook is ({CODES}, width), at most {MAX_CHANNELS} wide"
        )
    return shape[1]


def _fill(module: Module, reader: NpzReader, layers: Mapping[str, str]) -> None:
    """Put the file's arrays in the place of the module's parameters, after a look at their shapes and dtypes."""
    import torch

    names = {f"{layer}.{part}": f"{ours}.{part}" for layer, ours in layers.items() for part in ("weight", "bias")}
    names[CODEBOOK] = "codebook.weight"
    with torch.no_grad():
        parameters = dict(module.named_parameters())
        for name, ours in names.items():
            entry, parameter = reader.entries[name], parameters.pop(ours)
            if entry.shape != tuple(parameter.shape):
                raise WeightsError(
                    f"{reader.path}: {name} is {entry.shape} in the file, {tuple(parameter.shape)} in the model"
                )
            if entry.dtype not in ("F64", "F32", "F16", "BF16"):
                raise WeightsError(f"{reader.path}: {name} is {entry.dtype}; weights are floating-point numbers")
            parameter.copy_(reader.read(name))
            parameter.requires_grad_(False)
    assert not parameters, f"not in the table: {sorted(parameters)}"
