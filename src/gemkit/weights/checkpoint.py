"""What a name or a path stands for: which files, in which format, of which architecture, with which vocabulary.

Nothing here imports torch: printing or comparing a checkpoint costs reading its headers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from gemkit import family
from gemkit.errors import WeightsError
from gemkit.family import DecoderConfig, Member, Prompt, Vision
from gemkit.files import DTYPES
from gemkit.text import Tokenizer
from gemkit.text.prompts import FIM_PREFIX
from gemkit.text.vocabulary import IMAGE
from gemkit.weights import configs
from gemkit.weights.formats.base import MAX_HEADER, Format, Reader, parse_json, sniff
from gemkit.weights.formats.gguf import GGUFReader
from gemkit.weights.formats.safetensors import SafetensorsReader
from gemkit.weights.formats.torch_checkpoint import CkptReader
from gemkit.weights.maps import Part, name_map
from gemkit.weights.resolve import Place, resolve


@dataclass
class Checkpoint:
    """A model on disk, its headers read and checked, its weights not yet. A context manager: it holds open files."""

    label: str  # what to call it in messages and tables
    path: Path
    format: Format
    reader: Reader
    decoder: DecoderConfig
    member: Member | None = None  # the member that it was asked for as, if it was by name
    vision: Vision | None = None
    notes: list[str] = field(default_factory=list)  # what a user should know of how it was read
    adapters: tuple[Path, ...] = ()  # folders of what is to be added to it, if it was asked for by one
    name: str | None = None  # what `resolve` finds it by again, from any folder; None is the starter model

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.close()

    @property
    def display_name(self) -> str:
        """What others know it by: its hub id, or its place."""
        if self.name is not None:
            return self.name
        return self.member.hub_id if self.member is not None else self.label

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The vocabulary that came with the weights.

        Raises:
            WeightsError: if there is none, or if it is another model's.
        """
        if self.format == "gguf":
            metadata = self.reader.metadata
            try:
                columns = [metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type")]
            except KeyError as error:
                raise WeightsError(
                    f"{self.label}: the GGUF has no {error.args[0]}: its vocabulary is missing"
                ) from None
            tokenizer = Tokenizer.from_pieces(*columns)
        else:
            tokenizer = _tokenizer_in(self._folder, self.member)
        vision = self.vision
        if vision is not None and vision.image_token != (image := tokenizer.id(IMAGE)):
            raise WeightsError(
                f"{self.label}: its image_token_index is {vision.image_token}, and {IMAGE} is token {image} of its "
                "tokenizer: they belong to different models"
            )
        rows, pieces = self.decoder.vocab_size, len(tokenizer)
        # Gemma 3's tokenizer.json has an image token that the tables of its text models have no row for
        beyond = [i for i in range(rows, pieces) if not tokenizer.is_control(i)] if pieces - rows < 10 else [rows]
        if beyond or rows > pieces + _PADDING_ROWS:
            raise WeightsError(
                f"{self.label}: the tokenizer has {pieces} pieces and the embedding {rows} rows: "
                "they belong to different models"
            )
        return tokenizer

    @property
    def _folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def prompts(self) -> tuple[Prompt, ...]:
        """What it was trained to answer: by the member's data, else by what the files say of themselves."""
        return with_adapters(self._own_prompts, self.adapters)

    @property
    def _own_prompts(self) -> tuple[Prompt, ...]:
        if self.member is not None:
            return self.member.prompts
        if self.vision is not None:
            return ("image",)
        if self.format == "gguf":
            return _prompts(self.tokenizer, "tokenizer.chat_template" in self.reader.metadata)
        return _prompts(self.tokenizer, _has_chat_template(self._folder))

    @cached_property
    def parts(self) -> list[Part]:
        """Where each parameter of the model is.

        Raises:
            WeightsError: if one is missing or misshapen, or if there is one that belongs nowhere: all of them, by name.
        """
        parts, problems = _fit(self.format, self.decoder, self.vision, self.reader)
        if problems:
            raise WeightsError(self._misfit(len(parts), problems))
        return parts

    def _misfit(self, total: int, problems: list[str]) -> str:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        fitting = [m.name for m in family.members() if not _fit(self.format, m.decoder, m.vision, self.reader)[1]]
        hint = f". These tensors are those of {' or '.join(fitting[:3])}" if fitting else ""
        return f"{self.label}: {len(problems)} tensors do not fit its {total} parameters: {shown}{hint}"


# Tables are padded past the tokenizer's pieces: 128 rows in Gemma's original, 64 in Gemma 3's image checkpoints.
_PADDING_ROWS = 128


def find(name: str | os.PathLike[str] | None) -> Checkpoint:
    """The checkpoint of a model. Raises as `resolve` and `open_place`; an adapter's folder is no model."""
    return open_place(resolve(name))


def vocabulary_of(place: Place) -> tuple[str, Tokenizer, tuple[Prompt, ...]]:
    """What a prompt for a model needs, without its weights: its name, its tokenizer, what it was trained to answer.

    Raises:
        WeightsError: if there is no tokenizer, or the files are those of no model.
    """
    if place.name is None or os.path.isabs(place.name):  # not from the hub: its headers are there to be checked
        with open_place(place) as checkpoint:
            return checkpoint.label, checkpoint.tokenizer, checkpoint.prompts
    folder, member = place.folder, place.member
    tokenizer = _tokenizer_in(folder, member)
    if member is None:
        shown: tuple[Prompt, ...] = ("image",) if _shows_images(folder, None) else ()
        prompts = shown or _prompts(tokenizer, _has_chat_template(folder))
    else:
        prompts = member.prompts
    return place.label, tokenizer, with_adapters(prompts, place.adapters)


def open_place(place: Place) -> Checkpoint:
    """Read and check the headers of the checkpoint at a place.

    Raises:
        WeightsError: if the files are incomplete, corrupt or of another kind.
    """
    checkpoint = open_path(place.path, place.label, place.member)
    checkpoint.name, checkpoint.adapters = place.name, place.adapters
    return checkpoint


def open_path(path: Path, label: str, member: Member | None = None) -> Checkpoint:
    """Read and check the headers of a checkpoint on disk."""
    format = sniff(path)
    reader = _READERS[format](path)
    try:
        return _describe(format, path, label, reader, member)
    except BaseException:
        reader.close()
        raise


_READERS: dict[Format, type[Reader]] = {"safetensors": SafetensorsReader, "gguf": GGUFReader, "ckpt": CkptReader}


def _describe(format: Format, path: Path, label: str, reader: Reader, member: Member | None) -> Checkpoint:
    """The architecture: from the configuration that came with the tensors, or else from their shapes."""
    if format == "gguf":
        table = reader.entries.get("token_embd.weight")
        if table is None or len(table.shape) != 2:
            raise WeightsError(f"{label}: token_embd.weight is missing or not a matrix")
        return Checkpoint(
            label, path, format, reader, configs.from_gguf(reader.metadata, table.shape[0], label), member
        )
    if format == "safetensors":
        folder = path if path.is_dir() else path.parent
        if not (folder / "config.json").is_file():
            raise WeightsError(
                f"{label}: there is no config.json in {folder}: copy it from where the weights come from"
            )
        config = read_json(folder / "config.json")
        if (kinds := configs.kinds(config, label)) and isinstance(reader, SafetensorsReader):
            reader.join(kinds)
        checkpoint = Checkpoint(label, path, format, reader, configs.from_hf(config, label), member)
        checkpoint.vision = configs.vision_from_hf(config, label)
        if checkpoint.vision is None and "vision_config" in config:
            checkpoint.notes.append("the image tower is left out: the text decoder alone is loaded")
        return checkpoint
    member = member or _member_of(format, reader, label)
    return Checkpoint(label, path, format, reader, member.decoder, member)


def _prompts(tokenizer: Tokenizer, has_chat_template: bool) -> tuple[Prompt, ...]:
    found: list[Prompt] = ["complete"]
    if has_chat_template:
        found.append("chat")
    if FIM_PREFIX in tokenizer:
        found.append("infill")
    return tuple(found)


def with_adapters(prompts: tuple[Prompt, ...], folders: Iterable[Path]) -> tuple[Prompt, ...]:
    """What a model answers with adapters: one that was tuned for chat leaves a template beside it."""
    if "chat" not in prompts and any(map(_has_chat_template, folders)):
        return (*prompts, "chat")
    return prompts


def _has_chat_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and "chat_template" in read_json(settings)


def _tokenizer_in(folder: Path, member: Member | None) -> Tokenizer:
    for name, read in (("tokenizer.model", Tokenizer.from_model), ("tokenizer.json", Tokenizer.from_json)):
        if (folder / name).is_file():
            tokenizer = read(folder / name)
            if _shows_images(folder, member):
                return tokenizer.with_places()
            return tokenizer.with_infill() if _names_infilling(folder, member) else tokenizer
    raise WeightsError(
        f"there is no tokenizer.model or tokenizer.json in {folder}: copy one from where the weights come from"
    )


def _names_infilling(folder: Path, member: Member | None) -> bool:
    """Whether four unused pieces are CodeGemma's: its tokenizer.model may not say so, what lies beside it does."""
    if member is not None:
        return member.vocabulary == "codegemma"
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and FIM_PREFIX in str(read_json(settings))


def _shows_images(folder: Path, member: Member | None) -> bool:
    """Whether the vocabulary is PaliGemma's: its tokenizer.model may lack the places, or only `<image>`."""
    if member is not None:
        return member.vocabulary == "paligemma"
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("model_type") == "paligemma"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a small file.

    Raises:
        WeightsError: if it is something else.
    """
    try:
        if path.stat().st_size > MAX_HEADER:
            raise WeightsError(f"{path}: {path.stat().st_size:,} bytes is too large for a configuration")
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from error


def _member_of(format: Format, reader: Reader, label: str) -> Member:
    """The member whose parameters these are: for formats that carry no configuration."""
    for member in family.members():
        if not _fit(format, member.decoder, member.vision, reader)[1]:
            return member
    raise WeightsError(f"{label}: its tensors are those of no member that is known here")


def _fit(format: Format, decoder: DecoderConfig, vision: Vision | None, reader: Reader) -> tuple[list[Part], list[str]]:
    """Where each parameter is, and what is wrong with that: missing, misshapen or left over."""
    shapes = dict(family.parameters(decoder, vision))
    table = name_map(format, decoder, vision)
    try:
        parts = table.parts(decoder, shapes, reader.entries)
    except KeyError as error:
        return [], [f"no parameter {error.args[0]} in this format"]
    problems = []
    used = set()
    for part in parts:
        used.add(part.theirs)
        entry = reader.entries.get(part.theirs)
        if entry is None:
            problems.append(f"{part.theirs} is missing")
        elif entry.dtype in DTYPES and entry.dtype not in FLOATS:
            problems.append(f"{part.theirs} is stored as {entry.dtype}, which is no weight")
        elif tuple(entry.shape) != part.layout.shape:
            problems.append(f"{part.theirs} is {tuple(entry.shape)} in the file, {part.layout.shape} in the model")
    used |= {*TIED_HEADS, SCORE}
    left = [name for name in reader.entries if name not in used and not table.ignores(name)]
    problems += [f"{name} belongs nowhere" for name in left]
    return parts, problems


# Dense types that weights are stored in.
FLOATS = ("F32", "F16", "BF16")
# The head of a reward model, beside everything that a model of text has.
SCORE = "score.weight"
# Copies of the tied head that some files carry. They must equal the embedding, which loading checks.
TIED_HEADS = ("lm_head.weight", "language_model.lm_head.weight", "output.weight")
