"""A checkpoint with its headers read and checked: resolve -> open a reader -> describe -> fit, each entered once.

    resolve.py    the name of a model to the place of its files
    formats/      the reader of those files: tensors by name
    describe.py   the architecture, the tokenizer and the prompt formats
    fit.py        where each parameter of the architecture is among the tensors

Nothing here imports torch: printing or comparing a checkpoint costs reading its headers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property

from gemkit.family import DecoderConfig, Member, Modality, Prompt
from gemkit.text import Tokenizer
from gemkit.weights import generation
from gemkit.weights.describe import Description, describe, prompts_of, read_tokenizer
from gemkit.weights.fit import fit
from gemkit.weights.formats.base import Reader
from gemkit.weights.formats.sniff import open_reader
from gemkit.weights.generation import Generation
from gemkit.weights.maps import Part
from gemkit.weights.resolve import Place, resolve


@dataclass
class Checkpoint:
    """A model on disk, its headers read and checked, its weights not yet. A context manager: it holds open files."""

    place: Place
    reader: Reader
    description: Description

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.close()

    @property
    def label(self) -> str:
        """The model in messages and tables."""
        return self.place.label

    @property
    def display_name(self) -> str:
        """The name that others know the model by: its hub id, or its place."""
        if self.place.name is not None:
            return self.place.name
        return self.place.member.hub_id if self.place.member is not None else self.place.label

    @property
    def member(self) -> Member | None:
        """The member that it is, if it was asked for by name or has no configuration of its own."""
        return self.description.member

    @property
    def decoder(self) -> DecoderConfig:
        return self.description.decoder

    @property
    def vision(self) -> Modality | None:
        return self.description.vision

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that came with the weights.

        Raises:
            WeightsError: if there is none, or if it is another model's.
        """
        return read_tokenizer(self.reader, self.place, self.description)

    @cached_property
    def generation(self) -> Generation:
        """How the model is meant to be asked, by the folder that it came in."""
        if self.reader.format == "gguf":
            return generation.from_gguf(self.reader.metadata, self.label)
        return generation.read(self.place.folder)

    @cached_property
    def prompts(self) -> tuple[Prompt, ...]:
        """The prompt formats that it was trained on, its adapters included."""
        return prompts_of(self.reader, self.place, self.description, self.tokenizer)

    @cached_property
    def parts(self) -> list[Part]:
        """Where each parameter of the model is.

        Raises:
            WeightsError: if one is missing or misshapen, or if there is one that belongs nowhere: all of them, by name.
        """
        return fit(self.reader, self.decoder, self.vision, self.label)


def open_checkpoint(place: Place) -> Checkpoint:
    """Read and check the headers of the checkpoint at a place.

    Raises:
        WeightsError: if the files are incomplete, corrupt or of another kind.
        ConfigError: if the architecture is not implemented.
    """
    reader = open_reader(place.path)
    try:
        return Checkpoint(place, reader, describe(reader, place))
    except BaseException:
        reader.close()
        raise


def find(name: str | os.PathLike[str] | None) -> Checkpoint:
    """The checkpoint of a model. Raises as `resolve` and `open_checkpoint`; an adapter's folder is no model."""
    return open_checkpoint(resolve(name))
