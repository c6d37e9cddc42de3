"""The tensors of a file from the parameters of a model: the name tables in the direction of writing."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gemkit import family
from gemkit.errors import ConfigError
from gemkit.nn import LanguageModel
from gemkit.ops import Quantized
from gemkit.weights.formats.base import Format
from gemkit.weights.maps import Part, by_file_name, name_map


def file_parts(module: LanguageModel, format: Format) -> dict[str, list[Part]]:
    """The parameters of each tensor that a file of this format holds, in the order of the model.

    Raises:
        ConfigError: if the format has no name for one of them.
    """
    shapes = dict(family.parameters(module.config, module.vision))
    try:
        parts = name_map(format, module.config, module.vision).parts(module.config, shapes)
    except KeyError as error:
        raise ConfigError(f"{format} files have no name for {error.args[0]}: save this model as safetensors") from None
    return by_file_name(parts)


def file_tensors(
    module: LanguageModel, format: Format, *, dtype: torch.dtype | None = None, quantized: bool = False
) -> Iterator[tuple[str, Tensor | Quantized]]:
    """Every tensor of a file by its name, on the CPU, one after the other.

    Args:
        dtype: of dense weights. None: as they are; what is stored as `1 + w` is float32 in any case.
        quantized: quantized weights stay `Quantized` where the file has them as they are. False makes them dense in
            `dtype`, or in float32, which is exact.

    Raises:
        ConfigError: if the format has no name for a parameter.
    """
    for name, parts in file_parts(module, format).items():
        first = module.get_param(parts[0].param_name)
        if quantized and isinstance(first, Quantized) and parts[0].plain:
            yield name, first.to("cpu")
            continue
        given = [_given(module, part, dtype) for part in parts]
        yield name, given[0] if len(given) == 1 else torch.cat(given)


def _given(module: LanguageModel, part: Part, dtype: torch.dtype | None) -> Tensor:
    value = module.get_param(part.param_name)
    dense = value.dequantize() if isinstance(value, Quantized) else value.detach()
    rounded = dtype if dtype is not None and not part.layout.plus_one else dense.dtype
    return part.give(dense.to(device="cpu", dtype=rounded).contiguous())
