"""Makes the generated parts of the pages in this folder: `make docs`. A test checks that they are up to date.

A generated part stands between `<!-- made: NAME -->` and `<!-- end -->`, where NAME is one of `MAKERS`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from gemkit import cli
from gemkit.adapters.peft_config import ADAPTER
from gemkit.family import DecoderConfig, Member, members
from gemkit.inspect import cost, units
from gemkit.inspect.compare import each, ffw_widths, heads, pattern, ropes, scale, shared
from gemkit.weights.keys_beside import GENERATION, PREPROCESSOR, PROCESSOR, TOKENIZER, TOKENIZER_JSON
from gemkit.weights.keys_config import CONFIGS
from gemkit.weights.keys_gguf import GGUF
from gemkit.weights.known_keys import Table

PAGES = Path(__file__).parent
_MADE = re.compile(r"(<!-- made: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(page: str) -> str:
    """The text of a page with its generated parts made anew."""
    return _MADE.sub(lambda part: f"{part[1]}\n{MAKERS[part[2]]()}\n\n{part[3]}", page)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a heading that begins with > is aligned to the right."""
    lines = [[heading.lstrip(">") for heading in headings], ["--:" if h.startswith(">") else "---" for h in headings]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [*lines, *rows])


# ---------------------------------------------------------------- the family


def shapes() -> str:
    """One row for each architecture: members with the same decoder share it."""
    headings = "member", ">parameters", ">D", ">F", "N x H", ">K", "layers", ">window", ">V", ">context"
    rows = []
    for member in _architectures():
        d, count = member.decoder, cost.count(member.decoder, member.vision)
        rows.append(
            [
                f"`{member.name}`",
                units.exact(count.total),
                units.exact(d.width),
                ffw_widths(d),
                heads(d).replace(" of ", " x "),
                each(str)(shared(mixer.kv_heads for mixer in d.attention)),
                pattern(d.layers),
                ", ".join(map(units.exact, d.windows)),
                units.exact(d.vocab_size),
                units.exact(d.max_context),
            ]
        )
    return table(headings, rows)


def details() -> str:
    """What is computed differently, one row for each architecture."""
    headings = "member", "norms a block", "norm on q, k", "cap on scores", "cap on logits", "query scale", "rotation"
    return table(
        headings,
        [
            [
                f"`{member.name}`",
                "4" if d.post_norms else "2",
                "yes" if any(mixer.qk_norm for mixer in d.attention) else "",
                each(_cap)(shared(mixer.softcap for mixer in d.attention)),
                _cap(d.final_softcap),
                each(scale)(shared(mixer.scale for mixer in d.attention)),
                ropes(d),
            ]
            for member in _architectures()
            for d in [member.decoder]
        ],
    )


def costs() -> str:
    """What a member asks of a machine."""
    headings = "member", ">bf16", ">int4", ">cache a token", ">state at 8,192", ">one token at 8,192"
    return table(
        headings,
        [
            [
                f"`{member.name}`",
                units.memory(cost.weight_bytes(member.decoder, member.vision)),
                units.memory(cost.weight_bytes(member.decoder, member.vision, "int4")),
                units.kib(cost.cache_bytes_per_token(member.decoder).total),
                units.memory(cost.state_bytes(member.decoder, 8192).total),
                units.flops(cost.decode_flops(member.decoder, 8192)),
            ]
            for member in _architectures()
        ],
    )


def releases() -> str:
    """Every member."""
    headings = "family", "member", "released", "tuning", "trained to", "vocabulary", "also called"
    rows = []
    for family, of in groupby(members(), lambda member: member.family):
        for i, member in enumerate(of):
            rows.append(
                [
                    family if i == 0 else "",
                    f"`{member.name}`",
                    member.released,
                    member.tuning,
                    ", ".join(member.prompts),
                    member.vocabulary,
                    ", ".join(f"`{alias}`" for alias in member.aliases),
                ]
            )
    return table(headings, rows)


def images() -> str:
    """What an image costs, one row for each resolution, with the cache of each decoder."""
    seeing = [member for member in _architectures() if member.vision is not None]
    costs = [cost.images(member.decoder, member.vision) for member in seeing if member.vision]
    headings = (
        ">pixels",
        ">tokens",
        ">of the context",
        ">tower and projection",
        *(f">cache, {_size(m)}" for m in seeing),
    )
    return table(
        headings,
        [
            [
                f"{first.size} x {first.size}",
                units.exact(first.tokens),
                f"{first.tokens / seeing[0].decoder.max_context:.1%}",
                units.flops(first.flops),
                *(units.memory(image.state_bytes) for image in (first, *others)),
            ]
            for first, *others in zip(*costs, strict=True)
        ],
    )


def _size(member: Member) -> str:
    """`PaliGemma 2 10B`."""
    return f"{member.family} {member.name.split('-')[1].upper()}"


def _architectures() -> list[Member]:
    """The first member of each decoder."""
    first: dict[DecoderConfig, Member] = {}
    for member in members():
        first.setdefault(member.decoder, member)
    return list(first.values())


def _cap(cap: float | None) -> str:
    return "" if cap is None else f"{cap:g}"


# ---------------------------------------------------------------- the command line


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of every verb."""
    subparsers = argparse.ArgumentParser().add_subparsers()
    for verb in cli._VERBS:
        verb.add(subparsers)
    return dict(subparsers.choices)


def verbs() -> str:
    """The help of every verb, from its parser.

    Not what argparse prints: how it wraps lines and writes `-f FILE, --file FILE` depends on the version of Python.
    """
    return "\n\n".join(_verb(name, parser) for name, parser in parsers().items())


def _verb(name: str, parser: argparse.ArgumentParser) -> str:
    summary, _, examples = (parser.description or "").partition("\n\nexamples:\n")
    parts = [f"## gemkit {name}", summary, f"```sh\n{examples.rstrip()}\n```"]
    rows = []
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        for i, action in enumerate(actions):
            rows.append([(group.title or "") if i == 0 else "", _said(action), _help(action)])
    return "\n\n".join([*parts, table(("", "as typed", "what it does"), rows)])


_REPEATED = {None: "{}", "?": "[{}]", "*": "[{} ...]", "+": "{} ..."}  # nargs -> how a positional argument is typed


def _said(action: argparse.Action) -> str:
    """An option or argument as it is typed."""
    value = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else None)
    value = value or (action.dest if not action.option_strings else action.dest.upper())
    if not action.option_strings:
        return f"`{_REPEATED[action.nargs].format(value)}`"
    takes_value = action.nargs != 0
    return ", ".join(f"`{option} {value}`" if takes_value else f"`{option}`" for option in action.option_strings)


def _help(action: argparse.Action) -> str:
    text = (action.help or "") % {**vars(action), "prog": "gemkit"}
    return text.replace("<", r"\<").replace("|", r"\|")


def keys() -> str:
    """The effect of each key of a `config.json`, a table for each model type."""
    parts = []
    for kind, known in CONFIGS.items():
        own = (
            known
            if kind == "gemma"
            else {name: key for name, key in known.items() if CONFIGS["gemma"].get(name) != key}
        )
        rest = "" if kind == "gemma" else ": keys that `gemma` lacks, or has otherwise"
        parts.append(f"### `{kind}`{rest}\n\n{_effects(own)}")
    return "\n\n".join(parts)


def keys_beside() -> str:
    """The effect of each key of the other files of a model."""
    files = {
        "generation_config.json": GENERATION,
        "tokenizer_config.json": TOKENIZER,
        "tokenizer.json": TOKENIZER_JSON,
        "processor_config.json": PROCESSOR,
        "preprocessor_config.json": PREPROCESSOR,
        "adapter_config.json": ADAPTER,
    }
    parts = [f"## Keys of `{file}`\n\n{_effects(known)}" for file, known in files.items()]
    return "\n\n".join([*parts, f"## Metadata of a GGUF\n\n{_effects(GGUF)}"])


def _effects(known: Table) -> str:
    rows = [[f"`{name}`", key.effect, key.why.replace("<", r"\<")] for name, key in sorted(known.items())]
    return table(("key", "here", "reason"), rows)


MAKERS = {
    "shapes": shapes,
    "details": details,
    "costs": costs,
    "releases": releases,
    "images": images,
    "verbs": verbs,
    "keys": keys,
    "keys_beside": keys_beside,
}


def main() -> None:
    for path in sorted(PAGES.glob("*.md")):
        page = path.read_text()
        if (made := render(page)) != page:
            path.write_text(made)
            print(f"{path.name}: made anew")


if __name__ == "__main__":
    main()
