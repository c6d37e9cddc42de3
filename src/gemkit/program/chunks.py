"""What every executor is asked to compute, and what it checks of it first. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from gemkit.errors import ConfigError, TextError
from gemkit.family import Decoder, Vision


class Wanted(Protocol):
    """What will be looked at of a row of logits (`generate.wanted.Wanted`)."""

    @property
    def best(self) -> int: ...
    @property
    def drop(self) -> float | None: ...
    @property
    def kept(self) -> np.ndarray: ...


class Chunk(Protocol):
    """The next tokens of one sequence (`generate.Chunk`)."""

    @property
    def slot(self) -> int: ...
    @property
    def ids(self) -> Sequence[int]: ...
    @property
    def rows(self) -> int: ...
    @property
    def prefix(self) -> int: ...
    @property
    def images(self) -> Sequence[np.ndarray]: ...
    @property
    def wanted(self) -> Wanted | None: ...


def check_ids(ids: Sequence[int], decoder: Decoder) -> None:
    """Raises: TextError, if a token id is outside the vocabulary."""
    limit = decoder.vocab_size
    if not 0 <= min(ids) <= max(ids) < limit:
        raise TextError(f"token ids run from 0 to {limit - 1}; the prompt has {min(ids)} to {max(ids)}")


def check_prefix(chunk: Chunk, position: int) -> None:
    """Raises: ConfigError, if a chunk at this position cuts its prefix."""
    end = position + len(chunk.ids)
    if position < chunk.prefix and (position or end < chunk.prefix):
        raise ConfigError(
            f"a prefix of {chunk.prefix} tokens is cut by a chunk of those from {position} to {end}: it is computed "
            "whole, for each of its tokens sees all others"
        )


def image_rows(chunks: Sequence[Chunk], vision: Vision | None) -> list[int]:
    """The rows of the placeholders of the chunks that bring images, counted over all chunks.

    Raises:
        ConfigError: if there are images for a model that sees none, or of several resolutions, or if placeholders and
            patches do not match.
    """
    found: list[int] = []
    start = 0
    if len(shapes := {image.shape for chunk in chunks for image in chunk.images}) > 1:
        raise ConfigError(f"images of the shapes {sorted(shapes)} in one batch: a tower sees one resolution")
    for chunk in chunks:
        if len(chunk.images):
            if vision is None:
                raise ConfigError(f"{len(chunk.images)} images for a model without an image tower")
            rows = [start + i for i, token in enumerate(chunk.ids) if token == vision.image_token]
            if len(rows) != len(chunk.images) * vision.num_patches:
                raise ConfigError(
                    f"{len(chunk.images)} images of {vision.num_patches} patches each, and {len(rows)} "
                    f"placeholders (id {vision.image_token}) for them: must agree"
                )
            found += rows
        start += len(chunk.ids)
    return found
