"""Text to ids and back, the prompt formats, and places in pictures as text. Never imports torch."""

from gemkit.text import tasks
from gemkit.text.places import Box, Place
from gemkit.text.prompts import (
    Prompt,
    Span,
    chat,
    complete,
    image,
    infill,
    infill_at,
    next_turn,
    stop_ids,
    templates_of,
)
from gemkit.text.tokenizer import StreamDecoder, Tokenizer
from gemkit.text.vocabulary import PieceType, Vocabulary

__all__ = [
    "Box",
    "PieceType",
    "Place",
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
    "templates_of",
]
