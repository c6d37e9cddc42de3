"""How a vocabulary is used: what the files beside it say of its special tokens, its ends and its turns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gemkit.text.vocabulary import BOS, EOS, PAD, UNK

if TYPE_CHECKING:
    from gemkit.text.chat_template import ChatTemplate

# The special tokens of the family, under the names that a tokenizer_config.json and a chat template give them.
SPECIAL = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": UNK}


@dataclass(frozen=True)
class Settings:
    """Settings of a tokenizer. The default is the family's own.

    Args:
        special: name ("bos_token", "eos_token", ...) to piece: variables of a chat template.
        add_bos: a text to be continued begins with `<bos>`.
        ends: ids that end an answer, beside `<eos>` and `<end_of_turn>`.
        chat_template: the turns of a model that was tuned for others than the family's; None is the family's.
        notes: for the user: what the files say and is not used.
    """

    special: Mapping[str, str] = field(default_factory=lambda: dict(SPECIAL))
    add_bos: bool = True
    ends: frozenset[int] = frozenset()
    chat_template: ChatTemplate | None = None
    notes: tuple[str, ...] = ()
