"""Text to ids and back, and the prompt formats. Never imports torch."""

from gemkit.text import tasks
from gemkit.text.prompts import Prompt, Span, chat, complete, image, infill, infill_at, next_turn, stop_ids
from gemkit.text.tokenizer import StreamDecoder, Tokenizer
from gemkit.text.vocabulary import PieceType, Vocabulary

__all__ = [
    "PieceType",
    "Prompt",
    "Span",
    "StreamDecoder",
    "Tokenizer",
    "Vocabulary",
    "chat",
    "complete",
    "image",
    "infill",
    "infill_at",
    "next_turn",
    "stop_ids",
    "tasks",
]
