"""The model card of what was changed: what it comes from, what it was trained on, and under which terms it is used."""

from __future__ import annotations

import json
from collections.abc import Sequence

# The notice that section 3.1 of the Gemma Terms of Use asks of everybody who passes a model or its derivatives on.
NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"


def card(title: str, base: str, lines: Sequence[str], *, adapter: bool, data: Sequence[str] = ()) -> str:
    """A README.md with the front matter that the hub reads.

    Args:
        base: what it was made from: a hub id, or a name.
        lines: how it was made, a sentence each.
        adapter: whether it is an adapter, which needs its base, or a whole model.
        data: what it was trained on, as far as it is known.
    """
    # strings of JSON are strings of YAML
    front = {"license": "gemma", "library_name": "peft" if adapter else "transformers", "tags": ["gemma", "gemkit"]}
    if "/" in base and not base.startswith(("/", ".", "~")):  # the hub resolves nothing else
        front["base_model"] = base
        front["base_model_relation"] = "adapter" if adapter else "finetune"
    header = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    origin = f"Base model: {base}" + (", which the adapter needs beside it." if adapter else ".")
    licence = (
        f"{NOTICE}. This is a modification of the base model. Its use is restricted by section 3.2 of those terms\n"
        "and by the Gemma Prohibited Use Policy (ai.google.dev/gemma/prohibited_use_policy)."
    )
    return "\n".join(header) + "\n" + _page(title, origin, lines, data, licence)


def new_card(title: str, lines: Sequence[str], data: Sequence[str]) -> str:
    """The README.md of a model that was trained from random weights; arguments as of `card`."""
    origin = "A model of the Gemma architecture, trained from random weights: none of Gemma's own are in it."
    licence = (
        "Yours, as far as the data allows. If answers of a Gemma were among the data, the model is a derivative:\n"
        f"{NOTICE}."
    )
    return _page(title, origin, lines, data, licence)


def _page(title: str, origin: str, lines: Sequence[str], data: Sequence[str], licence: str) -> str:
    sources = [f"- {source}" for source in data] or ["Not recorded."]
    parts = [f"# {title}", origin, "\n".join(lines), "## Data", "\n".join(sources), "## Licence", licence]
    return "\n\n".join(parts) + "\n"
