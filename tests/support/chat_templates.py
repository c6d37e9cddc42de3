"""Transformers' tokenizers with the chat template published for Gemma 3."""

import json
from functools import cache

from transformers import PreTrainedTokenizerFast

from fetch_oracles import fetch
from support.vocabularies import published


@cache
def marked(name: str) -> tuple[PreTrainedTokenizerFast, str]:
    """Their tokenizer with Gemma 3's published template, in which what the assistant says and <end_of_turn> are marked
    as generated; and the template as it was published, without marks."""
    plain = json.loads((fetch("tokenizer-gemma3") / "tokenizer_config.json").read_text())["chat_template"]
    content, end = "{{ message['content'] | trim }}", "{{ '<end_of_turn>\n' }}"
    assert plain.count(content) == plain.count(end) == 1
    said = (
        "{%- if role == 'model' -%}{%- generation -%}{{ (message['content'] | trim) + '<end_of_turn>' }}"
        "{%- endgeneration -%}{%- else -%}" + content + "{%- endif -%}"
    )
    template = plain.replace(content, said).replace(end, "{{ ('' if role == 'model' else '<end_of_turn>') + '\n' }}")
    return PreTrainedTokenizerFast(tokenizer_object=published(name), bos_token="<bos>", chat_template=template), plain
