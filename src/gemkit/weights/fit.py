"""The parameters of an architecture against the tensors of a file: where each one is, and what is wrong with that."""

from __future__ import annotations

from gemkit import family
from gemkit.errors import WeightsError
from gemkit.family import DecoderConfig, Member, Modality
from gemkit.files import DTYPES
from gemkit.weights.formats.base import Reader
from gemkit.weights.maps import Part, name_map

# Dense types that weights are stored in.
FLOATS = ("F32", "F16", "BF16")
# The head of a reward model, beside everything that a model of text has.
SCORE = "score.weight"
# Copies of the tied head that some files carry. They must equal the embedding, which loading checks.
TIED_HEADS = ("lm_head.weight", "language_model.lm_head.weight", "output.weight")


def fit(reader: Reader, decoder: DecoderConfig, vision: Modality | None, label: str) -> list[Part]:
    """Where each parameter of the model is.

    Raises:
        WeightsError: if one is missing or misshapen, or if there is one that belongs nowhere: all of them, by name, and
            the members that they would fit.
    """
    parts, problems = _compare(reader, decoder, vision)
    if not problems:
        return parts
    shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
    fitting = [member.name for member in family.members() if _fits(reader, member)]
    hint = f". These tensors are those of {' or '.join(fitting[:3])}" if fitting else ""
    raise WeightsError(f"{label}: {len(problems)} tensors do not fit its {len(parts)} parameters: {shown}{hint}")


def member_of(reader: Reader, label: str) -> Member:
    """The first member whose parameters these are: for formats that carry no configuration.

    Raises:
        WeightsError: if they are those of none.
    """
    member = next((member for member in family.members() if _fits(reader, member)), None)
    if member is None:
        raise WeightsError(f"{label}: its tensors are those of no member that is known here")
    return member


def _fits(reader: Reader, member: Member) -> bool:
    return not _compare(reader, member.decoder, member.vision)[1]


def _compare(reader: Reader, decoder: DecoderConfig, vision: Modality | None) -> tuple[list[Part], list[str]]:
    """Where each parameter is, and every tensor that is missing, misshapen, of another type or left over."""
    shapes = dict(family.parameters(decoder, vision))
    table = name_map(reader.format, decoder, vision)
    try:
        parts = table.parts(decoder, shapes, reader.entries)
    except KeyError as error:
        return [], [f"no parameter {error.args[0]} in this format"]
    problems = [problem for part in parts if (problem := _problem(part, reader))]
    used = {*(part.file_name for part in parts), *TIED_HEADS, SCORE}
    left = [name for name in reader.entries if name not in used and not table.ignores(name)]
    return parts, problems + [f"{name} belongs nowhere" for name in left]


def _problem(part: Part, reader: Reader) -> str | None:
    info = reader.entries.get(part.file_name)
    if info is None:
        return f"{part.file_name} is missing"
    if info.dtype in DTYPES and info.dtype not in FLOATS:
        return f"{part.file_name} is stored as {info.dtype}, which is no weight"
    if tuple(info.shape) != part.layout.shape:
        return f"{part.file_name} is {tuple(info.shape)} in the file, {part.layout.shape} in the model"
    return None
