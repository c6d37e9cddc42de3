"""Whole models at test size, with a vocabulary, in folders as they are published."""

from __future__ import annotations

import json
import string
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers

from gemkit import family
from gemkit.text import Tokenizer
from gemkit.text.prompts import CHAT_TEMPLATE
from gemkit.text.vocabulary import BYTES, IMAGE, INFILL, PieceType
from support.tiny import TOWER, reference, save_reference, tiny

LETTERS = string.ascii_letters + string.digits + ".,:;!?<>|_()\n"


def tokenizer(*, code: bool = False) -> Tokenizer:
    """Characters one by one, bytes for those that are no piece, and the control tokens of the family; `code` adds
    CodeGemma's. With one piece to a character, a text has exactly one encoding."""
    control = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", *(INFILL.values() if code else ())]
    pieces = {
        **dict.fromkeys(control, PieceType.CONTROL),
        "<unk>": PieceType.UNKNOWN,
        **dict.fromkeys(BYTES, PieceType.BYTE),
        **dict.fromkeys(["▁", *LETTERS], PieceType.NORMAL),
    }
    return Tokenizer.from_pieces(list(pieces), np.zeros(len(pieces), np.float32), [*pieces.values()])


def write(
    folder: Path,
    name: str = "gemma-2b",
    *,
    chat: bool = False,
    code: bool = False,
    parrot: bool = False,
    context: int = 256,
) -> transformers.PreTrainedModel:
    """Write the member's tiny twin with random weights to `folder`; Transformers' model of it. A member with an image
    tower has a tiny one, and a vocabulary with places.

    Args:
        chat: leave a chat template beside it, by which a folder shows that it was tuned for chat.
        parrot: give it weights that say the last token of the prompt over and over, at any temperature up to 1:
            attention and MLP add nothing, so the hidden state is the embedding, and no other row of the tied head is
            as long in its direction.
    """
    vocabulary, tower = tokenizer(code=code), None
    if family.get(name).vision is not None:
        vocabulary = vocabulary.with_places()
        tower = replace(TOWER, placeholder=vocabulary.id(IMAGE))
    model = reference(replace(tiny(name), vocab_size=len(vocabulary), max_context=context), tower)
    if parrot:
        with torch.no_grad():
            for parameter_name, weight in model.named_parameters():
                if "o_proj" in parameter_name or "down_proj" in parameter_name or "norm" in parameter_name:
                    weight.zero_()
            table = model.get_input_embeddings().weight
            table.copy_(10 * torch.nn.functional.normalize(table))
    save_reference(model, folder)
    vocabulary.save(folder / "tokenizer.model")
    if chat:
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return model


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
