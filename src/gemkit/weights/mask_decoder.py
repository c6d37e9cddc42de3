"""The published weights of the mask decoder: `vae-oid.npz` of google-research/big_vision.

The file is a NumPy archive of arrays in PyTorch's layout. What its layers are called there and here is the table
below; each has a `weight` and a `bias`. The codebook's width is the file's own.

Source: google-research/big_vision, evaluators/proj/paligemma/transfers/segmentation.py (`_get_params`).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from gemkit.errors import WeightsError
from gemkit.weights.formats.npz import NpzReader

if TYPE_CHECKING:
    from gemkit.nn.mask_decoder import MaskDecoder

CODEBOOK = "_vq_vae._embedding"  # codebook.weight here

# layer in the file -> ours
DECODER = {
    "decoder.0": "enter",
    **{
        f"decoder.{2 + block}.net.{2 * conv}": f"residuals.{block}.convs.{conv}"
        for block in range(2)
        for conv in range(3)
    },
    **{f"decoder.{4 + 2 * n}": f"enlarge.{n}" for n in range(4)},
    "decoder.12": "leave",
}

# More than a published file can need: a small file that unfolds to gigabytes is refused before it does.
MAX_CHANNELS = 1024


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
        _check_names(reader)
        module = MaskDecoder(_codebook_width(reader))
        _fill(module, reader)
    return module.eval()


def _check_names(reader: NpzReader) -> None:
    """Every array of the decoder and the codebook, and no other layer of a decoder."""
    wanted = {CODEBOOK, *(f"{layer}.{part}" for layer in DECODER for part in ("weight", "bias"))}
    if missing := sorted(wanted - set(reader.entries)):
        raise WeightsError(
            f"{reader.path}: {len(missing)} of {len(wanted)} arrays of the mask decoder are missing, the first is "
            f"{missing[0]}: is it big_vision's vae-oid.npz?"
        )
    if unknown := sorted(name for name in reader.entries if name.startswith("decoder.") and name not in wanted):
        raise WeightsError(f"{reader.path}: {unknown[0]} is no layer of the mask decoder: another architecture")


def _codebook_width(reader: NpzReader) -> int:
    from gemkit.nn.mask_decoder import CODES

    shape = reader.entries[CODEBOOK].shape
    if len(shape) != 2 or shape[0] != CODES or not 0 < shape[1] <= MAX_CHANNELS:
        raise WeightsError(
            f"{reader.path}: {CODEBOOK} is {shape}; a codebook is ({CODES}, width), at most {MAX_CHANNELS} wide"
        )
    return shape[1]


def _fill(module: MaskDecoder, reader: NpzReader) -> None:
    """Put the file's arrays in the place of the module's parameters, after a look at their shapes and dtypes."""
    import torch

    names = {f"{layer}.{part}": f"{ours}.{part}" for layer, ours in DECODER.items() for part in ("weight", "bias")}
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
