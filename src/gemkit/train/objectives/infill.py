"""Infilling: next-token prediction on code whose middle was cut out and comes last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gemkit.text import Tokenizer
from gemkit.train.batching import ExampleGroup
from gemkit.train.data.infilling import Infilling, encode_infill
from gemkit.train.objectives.pretrain import NextToken


class Infill(NextToken):
    """Learns to write what goes between, from files of code alone or several of a repository.

    The formats, and which of this is published, are in `data.infilling`.
    """

    name = "infill"
    forms = ("text", "files")

    Options = Infilling

    def __init__(self, tokenizer: Tokenizer, options: Infilling | None = None, *, context: int):
        self.tokenizer, self.context, self.options = tokenizer, context, options or Infilling()

    def encode(self, record: Mapping[str, Any], rng: np.random.Generator) -> list[ExampleGroup]:
        if "files" in record:
            files = [(file["path"], file["text"]) for file in record["files"]]
        else:
            files = [(record.get("path"), record["text"])]
        return [(row,) for row in encode_infill(self.tokenizer, files, rng, how=self.options, context=self.context)]
