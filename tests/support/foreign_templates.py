"""Chat templates as people's models have them, written for these tests in the manner of the tools that leave them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gemkit.text import Tokenizer
from gemkit.text.vocabulary import PieceType

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# name -> template; every one takes a system message first, but for those in NO_SYSTEM
TEMPLATES = {
    "chatml": CHATML,
    "chatml-bos": "{{ bos_token }}" + CHATML,
    "chatml-default-system": (
        "{{ bos_token }}{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
        + CHATML
    ),
    "llama": (
        "{{- bos_token }}\n{%- for message in messages %}\n"
        "    {{- '<|head|>' + message.role + '<|/head|>\\n\\n' + message.content | trim + '<|eot|>' }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|head|>assistant<|/head|>\\n\\n' }}\n{%- endif %}\n"
    ),
    "zephyr": (
        "{% for message in messages %}\n"
        "{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n' + message['content'] + eos_token }}\n"
        "{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
    ),
    "alpaca": (
        "{{ bos_token }}{% set ns = namespace(body=messages) %}{% if messages[0]['role'] == 'system' %}"
        "{{ messages[0]['content'] + '\n\n' }}{% set ns.body = messages[1:] %}{% endif %}{% for message in ns.body %}"
        "{% if message['role'] == 'user' %}{{ '## Instruction:\n' + message['content'] + '\n\n' }}"
        "{% else %}{{ '## Response:\n' + message['content'] + eos_token + '\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '## Response:\n' }}{% endif %}"
    ),
    "vicuna": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }} {% elif m.role == 'user' %}"
        "USER: {{ m.content.strip() }} {% else %}ASSISTANT: {{ m.content.strip() }}{{ eos_token }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "gemma-system-turn": (
        "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "gemma-eos": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<start_of_turn>' + m.role + '\n' + m.content + '<end_of_turn><eos>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "generation-tags": (
        "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}"
        "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "json-and-controls": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'skip' %}{% continue %}{% endif %}"
        "<|im_start|>{{ m | tojson }}<|im_end|>{% if loop.index > 40 %}{% break %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    ),
    "macro-tools": (
        "{%- macro turn(role, text) -%}{{ '<|im_start|>' ~ role ~ '\n' ~ text ~ '<|im_end|>\n' }}{%- endmacro -%}"
        "{{ bos_token }}{%- if tools %}{{ turn('tools', tools | tojson(indent=2)) }}{%- endif -%}"
        "{%- for m in messages %}{{ turn(m.role, m.content) }}{%- endfor -%}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
    ),
    "no-system": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        + CHATML
    ),
    "dated": "{{ bos_token }}{{ strftime_now('%Y') }}\n" + CHATML,
}
NO_SYSTEM = {"no-system"}

# What each asks for must end in an error within a second.
HOSTILE = {
    "loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "text": "{{ 'a' * 10**10 }}",
    "folded": "{{ ('a' * 100000) * 100000 }}",
    "power": "{{ 10**(10**9) }}",
    "doubling": "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "list": "{% set n = namespace(x=[0]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "tree": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "lipsum": "{{ lipsum(n=10**8) }}",
    "width": "{{ 'a' | center(10**10) }}",
    "nesting": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "append": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "output": "{% for i in range(90000) %}{{ 'a' * 1000 }}{% endfor %}",
    "syntax": "{% if %}",
    "namespace": "{{ namespace(__class__=1) }}",
}


def write_json(folder: Path, **settings: Any) -> None:
    """A tokenizer.json of the tokenizer.model in a folder, and a tokenizer_config.json, as converters write them."""
    vocabulary = Tokenizer.from_model(folder / "tokenizer.model").vocabulary
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": i, "content": piece, **flags, "special": True}
        for i, piece in enumerate(vocabulary.pieces)
        if vocabulary.types[i] in (PieceType.CONTROL, PieceType.UNKNOWN)
    ]
    bos = vocabulary.pieces.index("<bos>")
    head, text = {"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    root = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [head, text],
            "pair": [head, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [bos], "tokens": ["<bos>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(vocabulary.pieces)},
            "merges": [],
        },
    }
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer.json").write_text(json.dumps(root, ensure_ascii=False))
    config = {"tokenizer_class": "GemmaTokenizerFast", **names, "clean_up_tokenization_spaces": False, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
